// Messages from a program to its process while the program goes on.
//
// XLA's C interface is enough for that, and compiles in a moment.

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <vector>

#include "xla/ffi/api/c_api.h"

namespace {

using Message = std::vector<int32_t>;

struct Channels {
  std::mutex mutex;
  std::condition_variable announced;
  std::map<int32_t, std::deque<Message>> open;  // what wasn't received yet
  int32_t newest = 0;
};

Channels& All() {
  // Never destroyed, as a program may go on while its process ends.
  static auto* all = new Channels;
  return *all;
}

// XLA calls a handler first to ask which version of the interface it was made for.
bool TellsVersion(XLA_FFI_CallFrame* frame) {
  // Versions of the interface name the type of this differently.
  auto* extension = frame->extension_start;
  if (extension == nullptr || extension->type != XLA_FFI_Extension_Metadata) {
    return false;
  }
  auto* metadata = reinterpret_cast<XLA_FFI_Metadata_Extension*>(extension)->metadata;
  // What later versions have behind these members is zero.
  *metadata = {metadata->struct_size, metadata->api_version, 0};
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  return true;
}

}  // namespace

extern "C" {

// Opens a channel and returns its number, which no other channel ever has.
int32_t OpenChannel() {
  Channels& all = All();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.open[++all.newest];
  return all.newest;
}

void CloseChannel(int32_t number) {
  Channels& all = All();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.open.erase(number);
}

// Waits for a message of `size` numbers, and says whether it came.
int32_t Receive(int32_t number, int32_t* message, int32_t size, int32_t milliseconds) {
  Channels& all = All();
  std::unique_lock<std::mutex> lock(all.mutex);
  const auto has_come = [&] {
    const auto found = all.open.find(number);
    return found != all.open.end() && !found->second.empty() &&
           found->second.front().size() == static_cast<size_t>(size);
  };
  const std::chrono::milliseconds timeout(milliseconds);
  if (!all.announced.wait_for(lock, timeout, has_come)) return false;
  std::deque<Message>& messages = all.open[number];
  std::copy_n(messages.front().begin(), size, message);
  messages.pop_front();
  return true;
}

// Operands: the message, an int32 array; the channel's number, an int32. Result: a
// boolean, whether that channel is open or the number is 0, of none.
XLA_FFI_Error* Announce(XLA_FFI_CallFrame* frame) {
  if (TellsVersion(frame)) return nullptr;
  const auto* message = static_cast<XLA_FFI_Buffer*>(frame->args.args[0]);
  const auto* channel = static_cast<XLA_FFI_Buffer*>(frame->args.args[1]);
  const auto* result = static_cast<XLA_FFI_Buffer*>(frame->rets.rets[0]);
  const int32_t number = *static_cast<const int32_t*>(channel->data);
  bool* is_open = static_cast<bool*>(result->data);
  *is_open = number == 0;
  if (number == 0) return nullptr;
  Channels& all = All();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.open.find(number);
  *is_open = found != all.open.end();
  if (!*is_open) return nullptr;
  int64_t size = 1;
  for (int64_t axis = 0; axis < message->rank; ++axis) size *= message->dims[axis];
  const auto* numbers = static_cast<const int32_t*>(message->data);
  found->second.emplace_back(numbers, numbers + size);
  all.announced.notify_all();
  return nullptr;
}

}  // extern "C"
