// Python module `_emulator`: options, kernels from PTX text, reports, diagnostics.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "runtime.h"
#include "tma.h"

namespace py = pybind11;

namespace flash_ext::emulator {
namespace {

using Triple = std::tuple<uint32_t, uint32_t, uint32_t>;
using Range = std::tuple<uint64_t, uint64_t, std::string, std::string>;  // address, bytes, role, name

Dim3 to_dim3(const Triple& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }
py::tuple from_dim3(const Dim3& d) { return py::make_tuple(d.x, d.y, d.z); }

Role parse_role(const std::string& name) {
  if (name == "in") return Role::kIn;
  if (name == "out") return Role::kOut;
  if (name == "inout") return Role::kInOut;
  if (name == "workspace") return Role::kWorkspace;
  throw std::invalid_argument("role '" + name + "' is none of in, out, inout, workspace");
}

std::string schedule_name(const Options& options) {
  if (options.adversarial) return "adversarial";
  switch (options.asynchrony) {
    case Asynchrony::kEarly:
      return "early";
    case Asynchrony::kLate:
      return "late";
    case Asynchrony::kRandom:
      break;
  }
  return "random";
}

// -- exceptions: EmulatorError carries what a Fault says; LoadError and LaunchError derive from it

struct Exceptions {
  py::object emulator, load, launch;
};
Exceptions& exceptions() {
  static Exceptions* const types = new Exceptions;  // never destroyed: outlives the interpreter
  return *types;
}

py::object make_error(const py::object& type, const std::string& text, const Fault& fault) {
  py::object error = type(text);
  error.attr("kind") = fault.kind;
  error.attr("message") = fault.message;
  error.attr("kernel") = fault.kernel;
  error.attr("file") = fault.file;
  error.attr("line") = fault.line;
  error.attr("ptx_line") = fault.ptx_line;
  error.attr("ptx") = fault.ptx;
  error.attr("cta") = from_dim3(fault.cta);
  error.attr("warp") = fault.warp;
  error.attr("lanes") = fault.lanes;
  error.attr("address") = fault.address;
  return error;
}

void raise(const py::object& type, const std::string& text, const Fault& fault) {
  PyErr_SetObject(type.ptr(), make_error(type, text, fault).ptr());
}

Fault plain_fault(const char* kind, const std::string& message) {
  Fault fault;
  fault.kind = kind;
  fault.message = message;
  return fault;
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const Diagnostic& e) {
    raise(exceptions().emulator, e.what(), e.fault());
  } catch (const LoadError& e) {
    raise(exceptions().load, e.what(), plain_fault("load", e.what()));
  } catch (const FatbinError& e) {
    raise(exceptions().load, e.what(), plain_fault("load", e.what()));
  } catch (const LaunchError& e) {
    raise(exceptions().launch, e.what(), plain_fault("launch", e.what()));
  } catch (const ApiError& e) {
    raise(exceptions().launch, e.what(), plain_fault("launch", e.what()));
  }
}

void define_exceptions(py::module_& m) {
  const auto define = [&](const char* name, const char* doc, py::handle base) {
    const std::string qualified = std::string("_emulator.") + name;
    auto type =
        py::reinterpret_steal<py::object>(PyErr_NewExceptionWithDoc(qualified.c_str(), doc, base.ptr(), nullptr));
    if (!type) throw py::error_already_set();
    m.attr(name) = type;
    return type;
  };
  exceptions().emulator =
      define("EmulatorError",
             "A fault of an emulated kernel: kind, message, kernel, file, line, ptx_line, ptx, cta, warp, "
             "lanes, address.",
             PyExc_RuntimeError);
  exceptions().load = define("LoadError", "Text that is not PTX, or a broken fat binary.", exceptions().emulator);
  exceptions().launch =
      define("LaunchError", "An unknown kernel, or a launch beyond the limits.", exceptions().emulator);
  py::register_local_exception_translator(&translate);
}

// -- launches of kernels from PTX text

py::dict describe_kernel(const KernelInfo& info) {
  py::list params;
  for (const ParamInfo& p : info.params) {
    params.append(py::make_tuple(p.name, p.offset, p.bytes, p.alignment));
  }
  py::dict out;
  out["name"] = info.name;
  out["params"] = params;
  out["param_bytes"] = info.param_bytes;
  out["static_shared_bytes"] = info.static_shared_bytes;
  out["max_threads"] = max_threads(info);
  out["required_cluster"] = from_dim3(info.required_cluster);
  return out;
}

Report launch_kernel(const Module& module, const std::string& kernel, const Triple& grid, const Triple& block,
                     const std::string& params, const std::vector<Range>& ranges, uint32_t shared,
                     const Triple& cluster, const std::optional<Options>& given) {
  const Options options = given ? *given : Runtime::get().options();
  const KernelInfo* info = module.find_kernel(kernel);
  if (!info) throw LaunchError("no kernel '" + kernel + "' in this PTX");
  Launch launch;
  launch.grid = to_dim3(grid);
  launch.block = to_dim3(block);
  launch.cluster = to_dim3(cluster);
  if (launch.cluster.count() == 1 && info->required_cluster.x) launch.cluster = info->required_cluster;
  launch.dynamic_shared_bytes = shared;
  launch.params.assign(params.begin(), params.end());
  if (launch.params.size() != info->param_bytes) {
    throw LaunchError(kernel + ": " + std::to_string(params.size()) + " bytes of parameters, " +
                      std::to_string(info->param_bytes) + " expected");
  }
  const DeviceModel& device = device_model(static_cast<int>(options.sm_version));
  const KernelLimits limits{device.shared_per_cta_optin - static_cast<int>(info->static_shared_bytes), true};
  const Refusal refusal = check_launch(device, *info, limits, launch);
  if (refusal.error) throw LaunchError(kernel + ": " + refusal.reason);
  MemoryMap memory;
  for (const auto& [address, bytes, role, name] : ranges) {
    memory.add(reinterpret_cast<const void*>(address), bytes, parse_role(role), name);
  }
  py::gil_scoped_release release;
  return emulator::launch(module, kernel, launch, memory, options);
}

py::memoryview symbol(const Module& module, const std::string& name) {
  size_t bytes = 0;
  void* const address = module.find_symbol(name, &bytes);
  if (!address) throw py::key_error("no variable '" + name + "' in this PTX");
  return py::memoryview::from_memory(address, static_cast<py::ssize_t>(bytes), /*readonly=*/false);
}

py::bytes encode_map(int type, uint64_t address, const std::vector<uint64_t>& dims,
                     const std::vector<uint64_t>& strides, const std::vector<uint32_t>& box,
                     const std::vector<uint32_t>& element_strides, int swizzle, int interleave, int l2_promotion,
                     int oob_fill) {
  if (dims.size() != box.size() || dims.size() != element_strides.size() || strides.size() + 1 != dims.size()) {
    throw std::invalid_argument(
        "a tensor map of rank r takes r sizes, r - 1 strides, r box sizes and r "
        "element strides");
  }
  alignas(64) char opaque[128] = {};
  const std::string refusal =
      encode_tensor_map({type, static_cast<uint32_t>(dims.size()), address, dims.data(), strides.data(), box.data(),
                         element_strides.data(), interleave, swizzle, l2_promotion, oob_fill},
                        opaque);
  if (!refusal.empty()) throw std::invalid_argument("cuTensorMapEncodeTiled: " + refusal);
  return py::bytes(opaque, sizeof(opaque));
}

py::list list_fatbin(const std::string& data) {
  py::list out;
  for (const FatbinImage& image : parse_fatbin(data.data(), data.size())) {
    const bool is_ptx = image.kind == FatbinImage::Kind::kPtx;
    out.append(py::make_tuple(is_ptx ? "ptx" : "sass", image.arch.name(),
                              is_ptx ? py::object(py::str(ptx_text(image))) : py::none()));
  }
  return out;
}

py::object take_diagnostic() {
  ThreadErrors& errors = thread_errors();
  if (!errors.diagnostic) return py::none();
  const Fault fault = *std::exchange(errors.diagnostic, std::nullopt);
  errors.last = cudaSuccess;
  return make_error(exceptions().emulator, Diagnostic(fault).what(), fault);
}

void define_options(py::module_& m) {
  py::class_<Options>(m, "Options", py::module_local(), "How kernels are run. Defaults come from FLASH_EXT_EMULATE*.")
      .def(py::init(&options_from_environment))
      .def(py::init<const Options&>())
      .def_readwrite("seed", &Options::seed)
      .def_readwrite("checks", &Options::checks)
      .def_readwrite("profile", &Options::profile)
      .def_readwrite("threads", &Options::num_threads)
      .def_readwrite("sms", &Options::num_sms)
      .def_readwrite("max_instructions", &Options::max_instructions)
      .def_property(
          "fp8_fraction_bits", [](const Options& o) { return o.fp8_fraction_bits; },
          [](Options& o, uint64_t bits) { set_fp8_fraction_bits(bits, &o); })
      .def_property(
          "sm", [](const Options& o) { return o.sm_version; },
          [](Options& o, int version) { o.sm_version = device_model(version).sm_version; })
      .def_property("schedule", &schedule_name, [](Options& o, const std::string& name) { apply_schedule(name, &o); })
      .def("__repr__", [](const Options& o) {
        return "Options(sm=" + std::to_string(o.sm_version) + ", sms=" + std::to_string(o.num_sms) +
               ", seed=" + std::to_string(o.seed) + ", schedule='" + schedule_name(o) +
               "', checks=" + (o.checks ? "True" : "False") + ")";
      });
  m.def("get_options", [] { return Runtime::get().options(); });
  m.def("set_options", [](const Options& o) { Runtime::get().set_options(o); });
}

void define_reports(py::module_& m) {
  py::class_<InstructionStats>(m, "InstructionStats", py::module_local())
      .def_readonly("ptx_line", &InstructionStats::ptx_line)
      .def_readonly("file", &InstructionStats::file)
      .def_readonly("line", &InstructionStats::line)
      .def_readonly("opcode", &InstructionStats::opcode)
      .def_readonly("executions", &InstructionStats::executions)
      .def_readonly("shared_requests", &InstructionStats::shared_requests)
      .def_readonly("shared_wavefronts", &InstructionStats::shared_wavefronts)
      .def_readonly("global_requests", &InstructionStats::global_requests)
      .def_readonly("global_sectors", &InstructionStats::global_sectors)
      .def_readonly("tma_bytes", &InstructionStats::tma_bytes);
  py::class_<BlockCoverage>(m, "BlockCoverage", py::module_local())
      .def_readonly("label", &BlockCoverage::label)
      .def_readonly("first_line", &BlockCoverage::first_line)
      .def_readonly("last_line", &BlockCoverage::last_line)
      .def_readonly("executions", &BlockCoverage::executions);
  py::class_<Report>(m, "Report", py::module_local())
      .def_readonly("kernel", &Report::kernel)
      .def_readonly("warp_instructions", &Report::warp_instructions)
      .def_readonly("seconds", &Report::seconds)
      .def_readonly("instructions", &Report::instructions)
      .def_readonly("blocks", &Report::blocks)
      .def_readonly("printed", &Report::printed);
  py::class_<LaunchRecord>(m, "LaunchRecord", py::module_local())
      .def_readonly("kernel", &LaunchRecord::kernel)
      .def_property_readonly("grid", [](const LaunchRecord& r) { return from_dim3(r.grid); })
      .def_property_readonly("block", [](const LaunchRecord& r) { return from_dim3(r.block); })
      .def_property_readonly("cluster", [](const LaunchRecord& r) { return from_dim3(r.cluster); })
      .def_readonly("dynamic_shared_bytes", &LaunchRecord::dynamic_shared_bytes)
      .def_readonly("warp_instructions", &LaunchRecord::warp_instructions)
      .def_readonly("seconds", &LaunchRecord::seconds);
  m.def("reports", [] { return Runtime::get().reports(); }, "One per kernel, summed over launches.");
  m.def("launches", [] { return Runtime::get().launches(); }, "The latest launches, oldest first.");
  m.def("reset_reports", [] { Runtime::get().reset_reports(); });
}

}  // namespace
}  // namespace flash_ext::emulator

PYBIND11_MODULE(_emulator, m) {
  using namespace flash_ext::emulator;
  m.doc() = "A PTX emulator: runs CUDA kernels on the CPU and says what is wrong with them.";
  define_exceptions(m);
  define_options(m);
  define_reports(m);

  py::class_<Module, std::shared_ptr<Module>>(m, "Module", py::module_local(), "Kernels and variables of one PTX text.")
      .def(py::init([](const std::string& ptx, const std::string& name) { return Module::load(ptx, name); }),
           py::arg("ptx"), py::arg("name") = "module")
      .def("kernel_names", &Module::kernel_names)
      .def("kernel",
           [](const Module& module, const std::string& name) {
             const KernelInfo* info = module.find_kernel(name);
             if (!info) throw LaunchError("no kernel '" + name + "' in this PTX");
             return describe_kernel(*info);
           })
      .def("symbol", &symbol, py::keep_alive<0, 1>(), "The bytes of a variable, writable.");
  m.def("launch", &launch_kernel, py::arg("module"), py::arg("kernel"), py::arg("grid"), py::arg("block"),
        py::arg("params"), py::arg("memory"), py::arg("shared") = 0, py::arg("cluster") = Triple{1, 1, 1},
        py::arg("options") = py::none(),
        "Runs a kernel; memory lists (address, bytes, role, name) of what it may touch.");
  m.def("encode_tensor_map", &encode_map, py::arg("type"), py::arg("address"), py::arg("dims"), py::arg("strides"),
        py::arg("box"), py::arg("element_strides"), py::arg("swizzle") = 0, py::arg("interleave") = 0,
        py::arg("l2_promotion") = 0, py::arg("oob_fill") = 0,
        "128 bytes as cuTensorMapEncodeTiled writes them; enumerators by value, innermost first.");
  m.def("parse_fatbin", &list_fatbin, "(kind, architecture, PTX or None) of each image.");

  m.def("kernels", [] { return Runtime::get().kernel_names(); }, "Kernels of loaded extensions.");
  m.def(
      "kernel_ptx", [](const std::string& name) { return Runtime::get().kernel_ptx(name); },
      "The PTX that launches of this kernel run on the emulated architecture.");
  m.def(
      "replace_ptx",
      [](const std::string& name, const std::optional<std::string>& ptx) { Runtime::get().replace_ptx(name, ptx); },
      py::arg("kernel"), py::arg("ptx"), "Runs other PTX for a kernel's translation unit; None undoes it.");
  m.def("take_diagnostic", &take_diagnostic,
        "The EmulatorError behind this thread's last failed launch, or None; forgets it.");
  m.def("last_message", [] { return thread_errors().message; }, "Why the last runtime call failed.");
  m.def("register_memory", [](uint64_t address, size_t bytes, const std::string& role, const std::string& name) {
    Runtime::get().memory().add(reinterpret_cast<const void*>(address), bytes, parse_role(role), name);
  });
  m.def("clear_memory", [] { Runtime::get().memory().clear(); });
}
