// A string argument of an operator that frees what it came in. PyTorch's own conversion to std::string leaks
// one string of 48 bytes a call up to version 2.13 (pytorch issue 191340), a megabyte every few hundred steps
// of a large model.
#pragma once
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <string>

namespace nvae {

// In a namespace of its own: functions of nvae are not found through their argument then, as they were not
// with std::string.
namespace text {
struct Text : std::string {
  using std::string::string;
};
}  // namespace text
using text::Text;

}  // namespace nvae

template <>
struct torch::stable::detail::ToImpl<nvae::Text> {
  static nvae::Text call(StableIValue value, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    STD_TORCH_CHECK(torch_string_length(handle, &length) == 0 && torch_string_c_str(handle, &data) == 0,
                    "nvae_fast: a string argument could not be read");
    nvae::Text text(data, length);
    STD_TORCH_CHECK(torch_delete_string(handle) == 0, "nvae_fast: a string argument could not be freed");
    return text;
  }
};
