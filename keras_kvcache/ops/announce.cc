// Sends what a program has made to a socket while the program goes on.
//
// XLA's C interface is enough for that, and compiles in a moment.

#include <sys/socket.h>

#include <cstdint>

#include "xla/ffi/api/c_api.h"

// Where there is no such flag, Python's choice to ignore SIGPIPE does it.
#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

namespace {

// XLA calls a handler first to ask which version of the interface it was made for.
bool TellsVersion(XLA_FFI_CallFrame* frame) {
  XLA_FFI_Extension_Base* extension = frame->extension_start;
  if (extension == nullptr || extension->type != XLA_FFI_Extension_Metadata) {
    return false;
  }
  auto* metadata = reinterpret_cast<XLA_FFI_Metadata_Extension*>(extension)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  metadata->traits = 0;
  metadata->state_type_id = XLA_FFI_UNKNOWN_TYPE_ID;
  return true;
}

}  // namespace

// Operands: the message, an int32 array; the socket's descriptor, an int32, negative
// for none. Result: a boolean, whether the message was sent.
extern "C" XLA_FFI_Error* Announce(XLA_FFI_CallFrame* frame) {
  if (TellsVersion(frame)) return nullptr;
  const auto* message = static_cast<XLA_FFI_Buffer*>(frame->args.args[0]);
  const auto* socket = static_cast<XLA_FFI_Buffer*>(frame->args.args[1]);
  const auto* result = static_cast<XLA_FFI_Buffer*>(frame->rets.rets[0]);
  ssize_t size = sizeof(int32_t);
  for (int64_t axis = 0; axis < message->rank; ++axis) size *= message->dims[axis];
  const int descriptor = *static_cast<const int32_t*>(socket->data);
  *static_cast<bool*>(result->data) =
      descriptor < 0 || send(descriptor, message->data, size, MSG_NOSIGNAL) == size;
  return nullptr;
}
