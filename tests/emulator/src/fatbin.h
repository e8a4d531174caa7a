// The fat binary that nvcc registers for a translation unit: which images it holds, and their PTX.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace flash_ext::emulator {

// A GPU architecture as nvcc spells it: 80, 90a, 100f.
struct Arch {
  int number = 0;   // major * 10 + minor
  char suffix = 0;  // 0, 'a' (this architecture only) or 'f' (this family)

  int major() const { return number / 10; }
  std::string name() const { return "sm_" + std::to_string(number) + (suffix ? std::string(1, suffix) : ""); }
  bool operator==(const Arch&) const = default;
};

// Parses "sm_90a", "compute_80", "90a" or "80"; throws std::invalid_argument otherwise.
Arch parse_arch(std::string_view text);

struct FatbinImage {
  enum class Kind { kPtx, kSass };
  enum class Compression { kNone, kLz4, kZstd };

  Kind kind = Kind::kPtx;
  Arch arch;
  Compression compression = Compression::kNone;
  std::string_view payload;  // as stored, padding included; points into the fat binary
  size_t size = 0;           // bytes once decompressed
};

struct FatbinError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Lists the images of a fat binary: either the `__fatBinC_Wrapper_t` that a host object registers,
// or the image that it points to. `max_size` bounds what may be read where the caller knows it.
std::vector<FatbinImage> parse_fatbin(const void* data, size_t max_size = SIZE_MAX);

// The PTX text of an image, LZ4 undone. Throws FatbinError for machine code and for zstd.
std::string ptx_text(const FatbinImage& image);

// The image whose PTX stands for what a GPU of architecture `device` would run: machine code of the
// same major version if there is any (its PTX sibling is taken), else the newest PTX it can compile.
// Returns nullptr if the GPU could run something but no PTX goes with it, or nothing at all;
// `why` then says which.
const FatbinImage* select_ptx(const std::vector<FatbinImage>& images, Arch device, std::string* why);

}  // namespace flash_ext::emulator
