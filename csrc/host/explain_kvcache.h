// What a planned call over a KV cache launches and allocates, for flash_ext.explain_with_kvcache; never on the path of a call.
#pragma once

#include <string>
#include <vector>

#include "host/plan_kvcache.h"

namespace flash_ext {

struct CacheCallReport {
  std::vector<std::string> kernels;  // in the order of their launches
  std::string keys_by;               // "tma" or "gather"
  int64_t workspace_bytes = 0;       // at the peak: partial results, rotated queries, lengths, parts, copies
  std::vector<std::string> copies;   // of q, k and v; a cache is never copied
};

// plan.variant is not null. new_k, new_v: the rows to append, or null.
CacheCallReport report_of(const CacheProblem& problem, const CachePlan& plan, const DeviceInfo& device,
                          const TensorLayout* new_k, const TensorLayout* new_v);

}  // namespace flash_ext
