/* Process, device, memory, streams and events of the simulated runtime. */
#include "cannsim.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int aclError;

/* ---- errors ---- */

static pthread_mutex_t error_lock = PTHREAD_MUTEX_INITIALIZER;
static char last_error[16384] = "cannsim: no error";

void cannsim_set_error(const char *text) {
  pthread_mutex_lock(&error_lock);
  snprintf(last_error, sizeof last_error, "%s", text);
  pthread_mutex_unlock(&error_lock);
}

const char *cannsim_error(void) { return last_error; }
const char *aclGetRecentErrMsg(void) { return last_error; }

/* ---- process and device ---- */

static __thread int current_device = -1;

static const char *setting(const char *name, const char *otherwise) {
  const char *value = getenv(name);
  return value ? value : otherwise;
}

aclError aclInit(const char *config) { (void)config; return CANNSIM_OK; }
aclError aclFinalize(void) { return CANNSIM_OK; }

aclError aclrtGetDeviceCount(uint32_t *count) {
  *count = (uint32_t)atoi(setting("CANNSIM_DEVICES", "8"));
  return CANNSIM_OK;
}

aclError aclrtSetDevice(int32_t device) { current_device = device; return CANNSIM_OK; }

aclError aclrtGetDevice(int32_t *device) {
  if (current_device < 0) return CANNSIM_NO_CONTEXT;
  *device = current_device;
  return CANNSIM_OK;
}

const char *aclrtGetSocName(void) { return setting("CANNSIM_SOC", "Ascend910B3"); }

aclError aclrtGetCurrentContext(void **context) {
  *context = (void *)(intptr_t)(0x1000 + (current_device < 0 ? 0 : current_device));
  return CANNSIM_OK;
}

aclError aclrtGetMemInfo(int kind, size_t *free_bytes, size_t *total) {
  (void)kind;
  *free_bytes = (size_t)60 << 30;
  *total = (size_t)64 << 30;
  return CANNSIM_OK;
}

aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
  (void)device;
  if (flags) *flags = 0;
  if (active) *active = 1;
  return CANNSIM_OK;
}

aclError aclrtGetLogicDevIdByUserDevId(int32_t user, int32_t *logic) {
  *logic = user;
  return CANNSIM_OK;
}

aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t a, int32_t b) {
  (void)a;
  (void)b;
  *can = 1;
  return CANNSIM_OK;
}

enum { CORES = 24 }; /* AI cores of a 910B3; every capability that is asked for gets this number */

aclError aclGetDeviceCapability(uint32_t device, int what, int64_t *value) {
  (void)device;
  (void)what;
  *value = CORES;
  return CANNSIM_OK;
}

aclError aclrtGetDeviceInfo(uint32_t device, int what, int64_t *value) {
  return aclGetDeviceCapability(device, what, value);
}

/* torch_npu reads back the options that it set, and fails if there is nothing to read. */
size_t aclGetCompileoptSize(int option) { (void)option; return 256; }

aclError aclGetCompileopt(int option, char *value, size_t bytes) {
  enum { ACL_OP_JIT_COMPILE = 10 };
  if (bytes) snprintf(value, bytes, "%s", option == ACL_OP_JIT_COMPILE ? "disable" : "");
  return CANNSIM_OK;
}

/* ---- memory ---- */

static aclError allocate(void **memory, size_t bytes) {
  return posix_memalign(memory, 512, bytes ? bytes : 512) ? CANNSIM_NO_MEMORY : CANNSIM_OK;
}

aclError aclrtMalloc(void **p, size_t bytes, int policy) { (void)policy; return allocate(p, bytes); }
aclError aclrtMallocAlign32(void **p, size_t bytes, int policy) {
  (void)policy;
  return allocate(p, bytes);
}
aclError aclrtFree(void *p) { free(p); return CANNSIM_OK; }
aclError aclrtMallocHost(void **p, size_t bytes) { return allocate(p, bytes); }
aclError aclrtMallocHostWithCfg(void **p, uint64_t bytes, void *config) {
  (void)config;
  return allocate(p, bytes);
}
aclError aclrtFreeHost(void *p) { free(p); return CANNSIM_OK; }

static cannsim_copy_hook copy_hook;
void cannsim_set_copy_hook(cannsim_copy_hook hook) { copy_hook = hook; }

enum { HOST_TO_DEVICE = 1, DEVICE_TO_HOST = 2 };

static aclError copy(struct cannsim_copy_call c) {
  if (cannsim_capturing()) {
    if (c.what == CANNSIM_COPY && c.kind == DEVICE_TO_HOST)
      return cannsim_refuse_in_capture("a copy from device to host memory");
    if (!c.is_async) return cannsim_refuse_in_capture("a synchronous aclrtMemcpy or aclrtMemset");
  }
  if (c.bytes) {
    if (c.what == CANNSIM_COPY)
      memmove(c.to, c.from, c.bytes);
    else
      memset(c.to, c.value, c.bytes);
  }
  if (copy_hook && cannsim_listening()) copy_hook(&c);
  return CANNSIM_OK;
}

aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind) {
  (void)room;
  return copy((struct cannsim_copy_call){CANNSIM_COPY, kind, 0, 0, to, from, bytes, 0});
}

aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind,
                          void *stream) {
  (void)room;
  return copy((struct cannsim_copy_call){CANNSIM_COPY, kind, 0, 1, to, from, bytes,
                                         cannsim_id(stream)});
}

aclError aclrtMemset(void *to, size_t room, int32_t value, size_t bytes) {
  (void)room;
  return copy((struct cannsim_copy_call){CANNSIM_SET, 0, value, 0, to, NULL, bytes, 0});
}

aclError aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t bytes, void *stream) {
  (void)room;
  return copy((struct cannsim_copy_call){CANNSIM_SET, 0, value, 1, to, NULL, bytes,
                                         cannsim_id(stream)});
}

/* ---- streams and events ---- */

long cannsim_next_id(void) {
  static long last;
  return __sync_add_and_fetch(&last, 1);
}

void *cannsim_new_object(void) {
  struct cannsim_object *object = calloc(1, sizeof *object);
  object->id = cannsim_next_id();
  return object;
}

long cannsim_id(const void *object) {
  return object ? ((const struct cannsim_object *)object)->id : 0;
}

static volatile int anybody_listens;
static pthread_t listener;

void cannsim_listen(int yes) {
  listener = pthread_self();
  anybody_listens = yes;
}
int cannsim_listening(void) {
  return anybody_listens && pthread_equal(listener, pthread_self());
}

static cannsim_order_hook order_hook;
void cannsim_set_order_hook(cannsim_order_hook hook) { order_hook = hook; }
static void tell(int what, const void *event, const void *stream) {
  if (order_hook && cannsim_listening()) order_hook(what, cannsim_id(event), cannsim_id(stream));
}

aclError aclrtCreateStream(void **stream) { *stream = cannsim_new_object(); return CANNSIM_OK; }
aclError aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) {
  (void)priority;
  (void)flags;
  return aclrtCreateStream(stream);
}
aclError aclrtDestroyStream(void *stream) { free(stream); return CANNSIM_OK; }
aclError aclrtDestroyStreamForce(void *stream) { free(stream); return CANNSIM_OK; }
aclError aclrtStreamGetId(void *stream, int32_t *id) {
  *id = (int32_t)cannsim_id(stream);
  return CANNSIM_OK;
}
aclError aclrtStreamQuery(void *stream, int *status) {
  (void)stream;
  *status = 0; /* complete */
  return CANNSIM_OK;
}

aclError aclrtSynchronizeStream(void *stream) {
  if (cannsim_capturing()) return cannsim_refuse_in_capture("aclrtSynchronizeStream");
  tell(CANNSIM_SYNC_STREAM, NULL, stream);
  return CANNSIM_OK;
}
aclError aclrtSynchronizeStreamWithTimeout(void *stream, int32_t milliseconds) {
  (void)milliseconds;
  return aclrtSynchronizeStream(stream);
}
aclError aclrtSynchronizeDevice(void) {
  if (cannsim_capturing()) return cannsim_refuse_in_capture("aclrtSynchronizeDevice");
  tell(CANNSIM_SYNC_DEVICE, NULL, NULL);
  return CANNSIM_OK;
}
aclError aclrtSynchronizeDeviceWithTimeout(int32_t milliseconds) {
  (void)milliseconds;
  return aclrtSynchronizeDevice();
}

aclError aclrtCreateEvent(void **event) { *event = cannsim_new_object(); return CANNSIM_OK; }
aclError aclrtCreateEventWithFlag(void **event, uint32_t flags) {
  (void)flags;
  return aclrtCreateEvent(event);
}
aclError aclrtCreateEventExWithFlag(void **event, uint32_t flags) {
  (void)flags;
  return aclrtCreateEvent(event);
}
aclError aclrtDestroyEvent(void *event) { free(event); return CANNSIM_OK; }

aclError aclrtRecordEvent(void *event, void *stream) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  if (event)
    ((struct cannsim_object *)event)->milliseconds = now.tv_sec * 1e3 + now.tv_nsec / 1e6;
  tell(CANNSIM_RECORD, event, stream);
  return CANNSIM_OK;
}

aclError aclrtStreamWaitEvent(void *stream, void *event) {
  tell(CANNSIM_WAIT, event, stream);
  return CANNSIM_OK;
}
aclError aclrtStreamWaitEventWithTimeout(void *stream, void *event, int32_t milliseconds) {
  (void)milliseconds;
  return aclrtStreamWaitEvent(stream, event);
}

aclError aclrtSynchronizeEvent(void *event) {
  if (cannsim_capturing()) return cannsim_refuse_in_capture("aclrtSynchronizeEvent");
  tell(CANNSIM_SYNC_EVENT, event, NULL);
  return CANNSIM_OK;
}
aclError aclrtSynchronizeEventWithTimeout(void *event, int32_t milliseconds) {
  (void)milliseconds;
  return aclrtSynchronizeEvent(event);
}
/* Who asks and is told "complete" knows as much as who has waited: memory is given out again. */
aclError aclrtQueryEventStatus(void *event, int *status) {
  if (!cannsim_capturing()) tell(CANNSIM_SYNC_EVENT, event, NULL);
  *status = 1; /* ACL_EVENT_RECORDED_STATUS_COMPLETE */
  return CANNSIM_OK;
}
aclError aclrtQueryEventWaitStatus(void *event, int *status) {
  (void)event;
  *status = 0; /* ACL_EVENT_WAIT_STATUS_COMPLETE */
  return CANNSIM_OK;
}
aclError aclrtEventElapsedTime(float *milliseconds, void *start, void *end) {
  *milliseconds = (float)(((struct cannsim_object *)end)->milliseconds -
                          ((struct cannsim_object *)start)->milliseconds);
  return CANNSIM_OK;
}

/* ---- string functions of securec, which CANN exports and torchair's messages are made with ---- */

int vsnprintf_s(char *to, size_t room, size_t count, const char *format, va_list args) {
  (void)count;
  int written = vsnprintf(to, room, format, args);
  return written < 0 || (size_t)written >= room ? -1 : written;
}

int snprintf_s(char *to, size_t room, size_t count, const char *format, ...) {
  va_list args;
  va_start(args, format);
  int written = vsnprintf_s(to, room, count, format, args);
  va_end(args);
  return written;
}

int strcpy_s(char *to, size_t room, const char *from) {
  size_t length = strlen(from);
  if (length >= room) return 34; /* ERANGE */
  memcpy(to, from, length + 1);
  return 0;
}
