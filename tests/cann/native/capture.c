/* ACL graph capture. Python records what runs between begin and end, and runs it again. */
#include "cannsim.h"

#include <stdio.h>

typedef int aclError;
enum { BEGIN, END, EXECUTE, DESTROY };
typedef int (*graph_hook)(int what, long graph, long stream);

static graph_hook hook;
static struct cannsim_object *open_graph;
static __thread int on_this_thread;

void cannsim_set_graph_hook(graph_hook h) { hook = h; }
int cannsim_capturing(void) { return on_this_thread; }

int cannsim_refuse_in_capture(const char *what) {
  char text[256];
  snprintf(text, sizeof text, "cannsim: %s is not allowed while an ACL graph is captured", what);
  cannsim_set_error(text);
  return CANNSIM_CAPTURE_REFUSES;
}

aclError aclmdlRICaptureBegin(void *stream, int mode) {
  (void)mode;
  if (open_graph) return cannsim_refuse_in_capture("a second capture");
  open_graph = cannsim_new_object();
  on_this_thread = 1;
  return hook ? hook(BEGIN, open_graph->id, cannsim_id(stream)) : CANNSIM_OK;
}

aclError aclmdlRICaptureEnd(void *stream, void **graph) {
  *graph = open_graph;
  long id = cannsim_id(open_graph);
  open_graph = NULL;
  on_this_thread = 0;
  return hook ? hook(END, id, cannsim_id(stream)) : CANNSIM_OK;
}

aclError aclmdlRICaptureGetInfo(void *stream, int *status, void **graph) {
  (void)stream;
  *status = open_graph ? 1 : 0;
  if (graph) *graph = open_graph;
  return CANNSIM_OK;
}

/* torch_npu tells captures apart by this: a graph that is destroyed while another is captured must
 * not be taken for that one. */
aclError aclmdlRIGetId(void *graph, uint32_t *id) {
  *id = (uint32_t)cannsim_id(graph);
  return CANNSIM_OK;
}

aclError aclmdlRIExecuteAsync(void *graph, void *stream) {
  return hook ? hook(EXECUTE, cannsim_id(graph), cannsim_id(stream)) : CANNSIM_OK;
}

aclError aclmdlRIExecute(void *graph, int32_t milliseconds) {
  (void)milliseconds;
  return aclmdlRIExecuteAsync(graph, NULL);
}

aclError aclmdlRIDestroy(void *graph) {
  return hook ? hook(DESTROY, cannsim_id(graph), 0) : CANNSIM_OK;
}
