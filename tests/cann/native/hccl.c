/* HCCL: the identity of communicators here, the movement of data in Python (over gloo).
 *
 * A communicator's name is what its ranks meet by, as in HCCL: rank 0 invents it as root info, and
 * the others get it from torch_npu's store.
 */
#include "cannsim.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef int HcclResult;
enum { NAME_BYTES = 128, ROOT_INFO_BYTES = 4108, HCCL_E_INTERNAL = 4, HCCL_E_NOT_SUPPORT = 5 };

struct communicator {
  char name[NAME_BYTES];
  uint32_t size, rank;
  struct communicator *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct communicator *all;

static HcclResult new_communicator(const char *name, uint32_t size, uint32_t rank, void **out) {
  // The ranks meet on the host, which a capture does not allow.
  if (cannsim_capturing()) return cannsim_refuse_in_capture("making a communicator");
  struct communicator *c = calloc(1, sizeof *c);
  snprintf(c->name, sizeof c->name, "%s", name);
  c->size = size;
  c->rank = rank;
  pthread_mutex_lock(&lock);
  c->next = all;
  all = c;
  pthread_mutex_unlock(&lock);
  *out = c;
  return 0;
}

/* For Python: who we are in the communicator of that name; 0 if there is none. */
int cannsim_find_communicator(const char *name, uint32_t *size, uint32_t *rank) {
  int found = 0;
  pthread_mutex_lock(&lock);
  for (struct communicator *c = all; c && !found; c = c->next)
    if (!strcmp(c->name, name)) {
      *size = c->size;
      *rank = c->rank;
      found = 1;
    }
  pthread_mutex_unlock(&lock);
  return found;
}

HcclResult HcclGetRootInfo(char *info) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  memset(info, 0, ROOT_INFO_BYTES);
  snprintf(info, NAME_BYTES, "cannsim_%d_%lx_%ld", (int)getpid(),
           now.tv_sec * 1000000000L + now.tv_nsec, cannsim_next_id());
  return 0;
}

HcclResult HcclCommInitRootInfo(uint32_t size, const char *info, uint32_t rank, void **out) {
  return new_communicator(info, size, rank, out);
}

HcclResult HcclCommInitRootInfoConfig(uint32_t size, const char *info, uint32_t rank,
                                      const void *config, void **out) {
  (void)config;
  return new_communicator(info, size, rank, out);
}

HcclResult HcclCreateSubCommConfig(void **parent, uint32_t size, uint32_t *ranks, uint64_t id,
                                   uint32_t rank, void *config, void **out) {
  (void)ranks;
  (void)config;
  char name[2 * NAME_BYTES];
  snprintf(name, sizeof name, "%s_sub%lu", (*(struct communicator **)parent)->name,
           (unsigned long)id);
  return new_communicator(name, size, rank, out);
}

HcclResult HcclCommDestroy(void *comm) {
  pthread_mutex_lock(&lock);
  for (struct communicator **p = &all; *p; p = &(*p)->next)
    if (*p == comm) {
      *p = (*p)->next;
      break;
    }
  pthread_mutex_unlock(&lock);
  free(comm);
  return 0;
}

HcclResult HcclGetCommName(void *comm, char *name) {
  strcpy(name, ((struct communicator *)comm)->name);
  return 0;
}
HcclResult HcclGetRankSize(void *comm, uint32_t *size) {
  *size = ((struct communicator *)comm)->size;
  return 0;
}
HcclResult HcclGetRankId(void *comm, uint32_t *rank) {
  *rank = ((struct communicator *)comm)->rank;
  return 0;
}
HcclResult HcclGetCommAsyncError(void *comm, HcclResult *error) {
  (void)comm;
  *error = 0;
  return 0;
}
const char *HcclGetErrorString(HcclResult code) {
  return code ? cannsim_error() : "no error";
}

/* ---- data: one record for every kind of call; Python reads what its kind needs ---- */

struct call {
  const char *kind, *comm;
  const void *send;
  void *recv;
  const int64_t *send_counts, *send_starts, *recv_counts, *recv_starts;
  uint64_t count;
  int32_t dtype, op, peer, size, rank;
  long stream;
};
typedef int (*data_hook)(struct call *);
static data_hook hook;
void cannsim_set_hccl_hook(data_hook h) { hook = h; }

static HcclResult move(struct call c, void *comm, void *stream) {
  struct communicator *who = comm;
  c.comm = who->name;
  c.size = (int32_t)who->size;
  c.rank = (int32_t)who->rank;
  c.stream = cannsim_id(stream);
  if (hook) return hook(&c) ? HCCL_E_INTERNAL : 0;
  cannsim_set_error("cannsim: an HCCL operation was called before cannsim.install()");
  return HCCL_E_NOT_SUPPORT;
}

HcclResult HcclAlltoAll(const void *send, uint64_t count, int dtype, const void *recv,
                        uint64_t recv_count, int recv_dtype, void *comm, void *stream) {
  (void)recv_count;
  (void)recv_dtype;
  return move((struct call){.kind = "alltoall", .send = send, .recv = (void *)recv, .count = count,
                            .dtype = dtype}, comm, stream);
}

HcclResult HcclAlltoAllV(const void *send, const void *send_counts, const void *send_starts,
                         int dtype, const void *recv, const void *recv_counts,
                         const void *recv_starts, int recv_dtype, void *comm, void *stream) {
  (void)recv_dtype;
  return move((struct call){.kind = "alltoallv", .send = send, .recv = (void *)recv,
                            .send_counts = send_counts, .send_starts = send_starts,
                            .recv_counts = recv_counts, .recv_starts = recv_starts,
                            .dtype = dtype}, comm, stream);
}

HcclResult HcclAllReduce(void *send, void *recv, uint64_t count, int dtype, int op, void *comm,
                         void *stream) {
  return move((struct call){.kind = "allreduce", .send = send, .recv = recv, .count = count,
                            .dtype = dtype, .op = op}, comm, stream);
}

HcclResult HcclAllGather(void *send, void *recv, uint64_t count, int dtype, void *comm,
                         void *stream) {
  return move((struct call){.kind = "allgather", .send = send, .recv = recv, .count = count,
                            .dtype = dtype}, comm, stream);
}

HcclResult HcclAllGatherV(void *send, uint64_t count, void *recv, const void *recv_counts,
                          const void *recv_starts, int dtype, void *comm, void *stream) {
  return move((struct call){.kind = "allgatherv", .send = send, .recv = recv, .count = count,
                            .recv_counts = recv_counts, .recv_starts = recv_starts,
                            .dtype = dtype}, comm, stream);
}

HcclResult HcclReduceScatter(void *send, void *recv, uint64_t count, int dtype, int op, void *comm,
                             void *stream) {
  return move((struct call){.kind = "reducescatter", .send = send, .recv = recv, .count = count,
                            .dtype = dtype, .op = op}, comm, stream);
}

HcclResult HcclBroadcast(void *buffer, uint64_t count, int dtype, uint32_t root, void *comm,
                         void *stream) {
  return move((struct call){.kind = "broadcast", .send = buffer, .recv = buffer, .count = count,
                            .dtype = dtype, .peer = (int32_t)root}, comm, stream);
}

HcclResult HcclSend(void *buffer, uint64_t count, int dtype, uint32_t to, void *comm,
                    void *stream) {
  return move((struct call){.kind = "send", .send = buffer, .count = count, .dtype = dtype,
                            .peer = (int32_t)to}, comm, stream);
}

HcclResult HcclRecv(void *buffer, uint64_t count, int dtype, uint32_t from, void *comm,
                    void *stream) {
  return move((struct call){.kind = "recv", .recv = buffer, .count = count, .dtype = dtype,
                            .peer = (int32_t)from}, comm, stream);
}

HcclResult HcclBarrier(void *comm, void *stream) {
  return move((struct call){.kind = "barrier"}, comm, stream);
}
