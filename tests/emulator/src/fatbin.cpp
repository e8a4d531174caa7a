#include "fatbin.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstring>

namespace flash_ext::emulator {
namespace {

constexpr uint32_t kWrapperMagic = 0x466243b1;
constexpr uint32_t kFatbinMagic = 0xba55ed50;
constexpr uint16_t kKindPtx = 1, kKindElf = 2;
constexpr uint64_t kFlagLz4 = 0x2000, kFlagZstd = 0x8000;
constexpr uint64_t kFlagArchSpecific = 0x100000, kFlagFamilySpecific = 0x200000;

struct Wrapper {
  uint32_t magic, version;
  const void* fatbin;
  const void* filename_or_modules;
};

struct FatbinHeader {
  uint32_t magic;
  uint16_t version, header_size;
  uint64_t size;  // of the images that follow the header
};

// Prefix of the header of one image; `header_size` says where the payload starts.
struct ImageHeader {
  uint16_t kind, version;
  uint32_t header_size;
  uint64_t padded_size;
  uint32_t compressed_size, options_offset;
  uint16_t minor, major;  // of the PTX or ELF version
  uint32_t arch, name_offset, name_size;
  uint64_t flags, reserved, decompressed_size;
};
static_assert(sizeof(ImageHeader) == 64);

template <class T>
T read(const char* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

// LZ4 block format: tokens of (literal length, match length), lengths of 15 continued in bytes.
std::string lz4_decompress(std::string_view in, size_t size) {
  const auto corrupt = [] { return FatbinError("fat binary: LZ4 data is corrupt"); };
  std::string out;
  out.reserve(size);
  size_t at = 0;
  const auto byte = [&] {
    if (at >= in.size()) throw corrupt();
    return static_cast<uint8_t>(in[at++]);
  };
  const auto length = [&](size_t base) {
    if (base != 15) return base;
    for (uint8_t more = 255; more == 255;) base += more = byte();
    return base;
  };
  while (out.size() < size) {
    const uint8_t token = byte();
    const size_t literals = length(token >> 4);
    if (literals > in.size() - at || literals > size - out.size()) throw corrupt();
    out.append(in.substr(at, literals));
    at += literals;
    if (out.size() == size) break;  // the last sequence has no match
    const size_t low = byte(), distance = low | static_cast<size_t>(byte()) << 8;
    const size_t match = length(token & 15) + 4;
    if (distance == 0 || distance > out.size() || match > size - out.size()) throw corrupt();
    if (distance >= match) {
      out.append(out, out.size() - distance, match);
    } else {  // the match reaches into what it writes
      for (size_t i = 0; i < match; ++i) out.push_back(out[out.size() - distance]);
    }
  }
  return out;
}

// What a GPU can run: machine code of its major version up to its minor one, any older PTX;
// 'a' images on exactly one architecture, 'f' images within the major version.
bool runs_on(const FatbinImage& image, Arch device) {
  if (image.arch.suffix == 'a') return image.arch.number == device.number;
  const bool same_major = image.arch.major() == device.major();
  if (image.kind == FatbinImage::Kind::kSass || image.arch.suffix == 'f') {
    return same_major && image.arch.number <= device.number;
  }
  return image.arch.number <= device.number;
}

}  // namespace

Arch parse_arch(std::string_view text) {
  std::string_view rest = text;
  for (std::string_view prefix : {"sm_", "compute_", "sm"}) {
    if (rest.starts_with(prefix)) {
      rest.remove_prefix(prefix.size());
      break;
    }
  }
  Arch arch;
  const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), arch.number);
  rest.remove_prefix(end - rest.data());
  if (rest == "a" || rest == "f") {
    arch.suffix = rest[0];
    rest = {};
  }
  if (error != std::errc() || !rest.empty() || arch.number < 10) {
    throw std::invalid_argument("not an architecture: '" + std::string(text) + "' (expected e.g. sm_90a)");
  }
  return arch;
}

std::vector<FatbinImage> parse_fatbin(const void* data, size_t max_size) {
  const char* base = static_cast<const char*>(data);
  if (max_size < sizeof(uint32_t)) throw FatbinError("fat binary: shorter than its magic number");
  if (read<uint32_t>(base) == kWrapperMagic) {
    if (max_size < sizeof(Wrapper)) throw FatbinError("fat binary: wrapper cut short");
    base = static_cast<const char*>(read<Wrapper>(base).fatbin);
    max_size = SIZE_MAX;
  }
  if (read<uint32_t>(base) != kFatbinMagic) {
    throw FatbinError("fat binary: bad magic number; not written by nvcc?");
  }
  if (max_size < sizeof(FatbinHeader)) throw FatbinError("fat binary: header cut short");
  const auto header = read<FatbinHeader>(base);
  if (header.header_size < sizeof(FatbinHeader) || header.header_size > max_size ||
      header.size > max_size - header.header_size) {
    throw FatbinError("fat binary: its header announces " + std::to_string(header.size) +
                      " bytes of images, more than there are");
  }
  std::vector<FatbinImage> images;
  const char* at = base + header.header_size;
  const char* const end = at + header.size;
  while (at < end) {
    const size_t left = end - at;
    if (left < sizeof(ImageHeader)) throw FatbinError("fat binary: image header cut short");
    const auto entry = read<ImageHeader>(at);
    if (entry.header_size < sizeof(ImageHeader) || entry.header_size > left ||
        entry.padded_size > left - entry.header_size) {
      throw FatbinError("fat binary: an image reaches beyond the end");
    }
    if (entry.kind == kKindPtx || entry.kind == kKindElf) {
      FatbinImage image;
      image.kind = entry.kind == kKindPtx ? FatbinImage::Kind::kPtx : FatbinImage::Kind::kSass;
      image.arch.number = static_cast<int>(entry.arch);
      image.arch.suffix = entry.flags & kFlagArchSpecific ? 'a' : entry.flags & kFlagFamilySpecific ? 'f' : 0;
      image.payload = {at + entry.header_size, entry.padded_size};
      image.size = entry.padded_size;
      if (entry.flags & (kFlagLz4 | kFlagZstd)) {
        image.compression = entry.flags & kFlagLz4 ? FatbinImage::Compression::kLz4 : FatbinImage::Compression::kZstd;
        if (entry.compressed_size > entry.padded_size) {
          throw FatbinError("fat binary: a compressed image reaches beyond its end");
        }
        image.payload = image.payload.substr(0, entry.compressed_size);
        image.size = entry.decompressed_size;
      }
      images.push_back(image);
    }
    at += entry.header_size + entry.padded_size;
  }
  return images;
}

std::string ptx_text(const FatbinImage& image) {
  if (image.kind != FatbinImage::Kind::kPtx) {
    throw FatbinError("fat binary: the image for " + image.arch.name() + " is machine code, not PTX");
  }
  switch (image.compression) {
    case FatbinImage::Compression::kZstd:
      throw FatbinError("fat binary: the PTX for " + image.arch.name() +
                        " is compressed with zstd; compile with nvcc --no-compress");
    case FatbinImage::Compression::kLz4: {
      std::string text = lz4_decompress(image.payload, image.size);
      text.resize(std::min(text.find('\0'), text.size()));
      return text;
    }
    case FatbinImage::Compression::kNone:
      break;
  }
  return std::string(image.payload.substr(0, image.payload.find('\0')));
}

const FatbinImage* select_ptx(const std::vector<FatbinImage>& images, Arch device, std::string* why) {
  const FatbinImage* best[2] = {nullptr, nullptr};  // PTX, machine code
  const auto rank = [](const FatbinImage& i) { return i.arch.number * 2 + (i.arch.suffix != 0); };
  for (const FatbinImage& image : images) {
    const FatbinImage*& slot = best[image.kind == FatbinImage::Kind::kSass];
    if (runs_on(image, device) && (!slot || rank(image) > rank(*slot))) slot = &image;
  }
  if (const FatbinImage* sass = best[1]) {
    for (const FatbinImage& image : images) {
      if (image.kind == FatbinImage::Kind::kPtx && image.arch == sass->arch) return &image;
    }
    *why = "a GPU of " + device.name() + " would run the machine code for " + sass->arch.name() +
           ", whose PTX is missing; compile with code=[" + sass->arch.name() + ",compute_" +
           sass->arch.name().substr(3) + "]";
    return nullptr;
  }
  if (!best[0]) {
    *why = "no image for " + device.name() + " among";
    for (const FatbinImage& image : images) {
      *why += image.kind == FatbinImage::Kind::kPtx ? " PTX " : " code ";
      *why += image.arch.name();
    }
  }
  return best[0];
}

}  // namespace flash_ext::emulator
