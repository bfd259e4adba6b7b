/* What the parts of the simulated CANN runtime share.
 *
 * Device memory is host memory, and streams run their work at once, on the host. Everything that
 * ascend_sp's tests want to know about order is told to Python through hooks instead.
 */
#ifndef CANNSIM_H
#define CANNSIM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { CANNSIM_OK = 0, CANNSIM_NO_CONTEXT = 107002, CANNSIM_NO_MEMORY = 207001 };
enum { CANNSIM_CAPTURE_REFUSES = 507901, CANNSIM_UNSUPPORTED = 500002 };

/* Streams, events and captured graphs: an identity, and for events the time of the last record. */
struct cannsim_object {
  long id;
  double milliseconds;
};

void *cannsim_new_object(void);
long cannsim_id(const void *object); /* 0 for the default stream */
long cannsim_next_id(void);

/* The text that aclGetRecentErrMsg and GEGetErrorMsg give; also how Python reports its errors. */
void cannsim_set_error(const char *text);
const char *cannsim_error(void);

/* Whether a graph is being captured on this thread. Set by capture.c. */
int cannsim_capturing(void);
int cannsim_refuse_in_capture(const char *what);

/* What happens on streams. */
enum cannsim_event { CANNSIM_RECORD, CANNSIM_WAIT, CANNSIM_SYNC_STREAM, CANNSIM_SYNC_EVENT,
                     CANNSIM_SYNC_DEVICE };
typedef void (*cannsim_order_hook)(int what, long event, long stream);
void cannsim_set_order_hook(cannsim_order_hook hook);

/* Hooks about order and copies are called only while somebody listens, and only on the thread that
 * began to: threads of torch_npu that look after events say nothing about a program's order, and
 * could wait for Python's lock for ever. */
void cannsim_listen(int yes);
int cannsim_listening(void);

enum cannsim_copy { CANNSIM_COPY, CANNSIM_SET };
struct cannsim_copy_call {
  int32_t what, kind, value, is_async;
  void *to;
  const void *from;
  uint64_t bytes;
  long stream;
};
typedef void (*cannsim_copy_hook)(const struct cannsim_copy_call *call);
void cannsim_set_copy_hook(cannsim_copy_hook hook);

/* A name that has no body was called; gives what its caller sees. */
long cannsim_stub_called(int index);

#ifdef __cplusplus
}
#endif
#endif
