// Graphs and sessions: what torchair's executors link to. Graphs go to Python as they are.
#include "ge.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "cannsim.h"

extern "C" {
struct cannsim_tensor {
  void *data;
  uint64_t bytes;
  int32_t dtype, rank, placement, unused;
  int64_t dims[16];
};
enum { MAX_OUTPUTS = 256 };
struct cannsim_summary {
  int32_t is_static, outputs;
  cannsim_tensor output[MAX_OUTPUTS];
};
typedef int (*add_hook)(uint32_t graph, const void *model, size_t bytes, const char *options,
                        cannsim_summary *summary);
typedef int (*run_hook)(uint32_t graph, long stream, int inputs, cannsim_tensor *input, int outputs,
                        cannsim_tensor *output);
typedef int (*remove_hook)(uint32_t graph);
static add_hook on_add;
static run_hook on_run;
static remove_hook on_remove;

void cannsim_set_ge_hooks(add_hook add, run_hook run, remove_hook remove) {
  on_add = add;
  on_run = run;
  on_remove = remove;
}

void *cannsim_allocate(uint64_t bytes) {
  void *memory = nullptr;
  return posix_memalign(&memory, 512, bytes ? bytes : 512) ? nullptr : memory;
}
}

namespace ge {
// ---- graphs ----

struct GraphImpl {
  std::string name, model;
};
class GNode {
 public:
  graphStatus GetType(AscendString &type) const;
  std::shared_ptr<void> impl_;
};
graphStatus GNode::GetType(AscendString &type) const {
  type = AscendString("");
  return SUCCESS;
}
class Graph {
 public:
  explicit Graph(const char *name);
  graphStatus LoadFromSerializedModelArray(const void *model, size_t bytes);
  graphStatus CopyFrom(const Graph &other);
  graphStatus SaveToFile(const char *path) const;
  std::vector<GNode> GetAllNodes() const;
  std::shared_ptr<GraphImpl> impl_;
};
Graph::Graph(const char *name) : impl_(std::make_shared<GraphImpl>()) { impl_->name = name; }
graphStatus Graph::LoadFromSerializedModelArray(const void *model, size_t bytes) {
  impl_ = std::make_shared<GraphImpl>();
  impl_->model.assign(static_cast<const char *>(model), bytes);
  return SUCCESS;
}
graphStatus Graph::CopyFrom(const Graph &other) {
  impl_ = std::make_shared<GraphImpl>(*other.impl_);
  return SUCCESS;
}
graphStatus Graph::SaveToFile(const char *path) const {
  FILE *file = fopen(path, "wb");
  if (!file) return FAILED;
  bool written = fwrite(impl_->model.data(), 1, impl_->model.size(), file) == impl_->model.size();
  return fclose(file) == 0 && written ? SUCCESS : FAILED;
}
std::vector<GNode> Graph::GetAllNodes() const { return {}; }

// ---- what compiling found out about a graph ----

struct SummaryData {
  bool is_static = true;
  std::vector<Shape> shapes;
  std::vector<DataType> dtypes;
};
class CompiledGraphSummary {
 public:
  bool IsStatic() const;
  Status GetConstMemorySize(size_t &bytes) const;
  Status GetFeatureMemorySize(size_t &bytes) const;
  Status GetFixedFeatureMemorySize(size_t &bytes) const;
  Status GetFeatureMemoryBaseRefreshable(bool &yes) const;
  Status GetOutputShapes(std::vector<Shape> &shapes) const;
  Status GetOutputDtypes(std::vector<DataType> &dtypes) const;
  std::shared_ptr<SummaryData> data_;
};
bool CompiledGraphSummary::IsStatic() const { return data_->is_static; }
// The executor allocates these and hands them over; nothing is kept there.
Status CompiledGraphSummary::GetConstMemorySize(size_t &bytes) const {
  bytes = 512;
  return SUCCESS;
}
Status CompiledGraphSummary::GetFeatureMemorySize(size_t &bytes) const {
  bytes = 4096;
  return SUCCESS;
}
Status CompiledGraphSummary::GetFixedFeatureMemorySize(size_t &bytes) const {
  bytes = 512;
  return SUCCESS;
}
Status CompiledGraphSummary::GetFeatureMemoryBaseRefreshable(bool &yes) const {
  yes = false;
  return SUCCESS;
}
Status CompiledGraphSummary::GetOutputShapes(std::vector<Shape> &shapes) const {
  shapes = data_->shapes;
  return SUCCESS;
}
Status CompiledGraphSummary::GetOutputDtypes(std::vector<DataType> &dtypes) const {
  dtypes = data_->dtypes;
  return SUCCESS;
}

// ---- sessions ----

static std::mutex summaries_lock;
static std::map<uint32_t, std::shared_ptr<SummaryData>> summaries;

static std::shared_ptr<SummaryData> summary_of(uint32_t graph) {
  std::lock_guard<std::mutex> guard(summaries_lock);
  auto found = summaries.find(graph);
  return found == summaries.end() ? nullptr : found->second;
}

static std::string as_text(const Options &options) {
  std::string text;
  for (auto &option : options) {
    text += option.first.GetString();
    text += '=';
    text += option.second.GetString();
    text += '\n';
  }
  return text;
}

class Allocator;
class Session {
 public:
  explicit Session(const Options &options);
  ~Session();
  Status AddGraph(uint32_t id, const Graph &graph, const Options &options);
  Status RemoveGraph(uint32_t id);
  Status CompileGraph(uint32_t id);
  std::shared_ptr<CompiledGraphSummary> GetCompiledGraphSummary(uint32_t id);
  Status RunGraph(uint32_t id, const std::vector<Tensor> &inputs, std::vector<Tensor> &outputs);
  Status RunGraphWithStreamAsync(uint32_t id, void *stream, const std::vector<Tensor> &inputs,
                                 std::vector<Tensor> &outputs);
  Status SetGraphConstMemoryBase(uint32_t, const void *, size_t);
  Status UpdateGraphFeatureMemoryBase(uint32_t, const void *, size_t);
  Status SetGraphFixedFeatureMemoryBase(uint32_t, const void *, size_t);
  Status UpdateGraphRefreshableFeatureMemoryBase(uint32_t, const void *, size_t);
  Status RegisterExternalAllocator(const void *const stream, std::shared_ptr<Allocator>) const;
  uint64_t sessionId_;
};
// Part of the object's layout is not ours, so the options are kept beside it.
static std::string session_options;
Session::Session(const Options &options) : sessionId_(1) { session_options = as_text(options); }
Session::~Session() {}

Status Session::AddGraph(uint32_t id, const Graph &graph, const Options &options) {
  if (!on_add) {
    cannsim_set_error("cannsim: a GE graph was added before cannsim.install()");
    return FAILED;
  }
  auto found = std::make_unique<cannsim_summary>();
  std::string text = session_options + as_text(options);
  const std::string &model = graph.impl_->model;
  if (on_add(id, model.data(), model.size(), text.c_str(), found.get())) return FAILED;
  auto data = std::make_shared<SummaryData>();
  data->is_static = found->is_static;
  for (int i = 0; i < found->outputs; i++) {
    const cannsim_tensor &output = found->output[i];
    data->shapes.emplace_back(std::vector<int64_t>(output.dims, output.dims + output.rank));
    data->dtypes.push_back(DataType(output.dtype));
  }
  std::lock_guard<std::mutex> guard(summaries_lock);
  summaries[id] = data;
  return SUCCESS;
}

Status Session::RemoveGraph(uint32_t id) { return on_remove && on_remove(id) ? FAILED : SUCCESS; }
Status Session::CompileGraph(uint32_t id) { return summary_of(id) ? SUCCESS : FAILED; }

std::shared_ptr<CompiledGraphSummary> Session::GetCompiledGraphSummary(uint32_t id) {
  auto data = summary_of(id);
  if (!data) return nullptr;
  auto summary = std::make_shared<CompiledGraphSummary>();
  summary->data_ = data;
  return summary;
}

static cannsim_tensor describe(const Tensor &tensor) {
  cannsim_tensor c = {};
  const TensorImpl &impl = *tensor.impl;
  c.data = impl.data;
  c.bytes = impl.bytes;
  c.dtype = impl.desc.dtype;
  c.placement = static_cast<int>(impl.desc.placement);
  c.rank = static_cast<int>(impl.desc.shape.size());
  for (int i = 0; i < c.rank; i++) c.dims[i] = impl.desc.shape[i];
  return c;
}

Status Session::RunGraphWithStreamAsync(uint32_t id, void *stream,
                                        const std::vector<Tensor> &inputs,
                                        std::vector<Tensor> &outputs) {
  if (!on_run) return FAILED;
  std::vector<cannsim_tensor> in, out;
  for (auto &tensor : inputs) in.push_back(describe(tensor));
  for (auto &tensor : outputs) out.push_back(describe(tensor));
  if (on_run(id, cannsim_id(stream), static_cast<int>(in.size()), in.data(),
             static_cast<int>(out.size()), out.data()))
    return FAILED;
  for (size_t i = 0; i < outputs.size(); i++) {
    Tensor &output = outputs[i];
    if (output.impl->data) continue;
    // Dynamic shapes: GE finds the size and owns the memory.
    output.impl->desc.shape.assign(out[i].dims, out[i].dims + out[i].rank);
    output.impl->desc.origin_shape = output.impl->desc.shape;
    output.impl->desc.dtype = out[i].dtype;
    output.impl->desc.placement = 1; /* device */
    output.SetData(static_cast<uint8_t *>(out[i].data), out[i].bytes, [](uint8_t *p) { free(p); });
  }
  return SUCCESS;
}

Status Session::RunGraph(uint32_t id, const std::vector<Tensor> &inputs,
                         std::vector<Tensor> &outputs) {
  auto data = summary_of(id);
  if (!data) return FAILED;
  if (outputs.empty()) outputs.resize(data->dtypes.size());
  return RunGraphWithStreamAsync(id, nullptr, inputs, outputs);
}

Status Session::SetGraphConstMemoryBase(uint32_t, const void *, size_t) { return SUCCESS; }
Status Session::UpdateGraphFeatureMemoryBase(uint32_t, const void *, size_t) { return SUCCESS; }
Status Session::SetGraphFixedFeatureMemoryBase(uint32_t, const void *, size_t) { return SUCCESS; }
Status Session::UpdateGraphRefreshableFeatureMemoryBase(uint32_t, const void *, size_t) {
  return SUCCESS;
}
Status Session::RegisterExternalAllocator(const void *const, std::shared_ptr<Allocator>) const {
  return SUCCESS;
}

// ---- process-wide ----

Status GEInitialize(const Options &) { return SUCCESS; }
Status GEFinalize() { return SUCCESS; }
// std::string in the old ABI, as torchair's _abi_compat_ge_apis.so wants it; see build.py.
std::string GEGetErrorMsg() { return cannsim_error(); }
AscendString GEGetWarningMsgV2() { return AscendString(""); }
const char *GetFormatName(Format) { return "ND"; }

// ---- operators, which torchair creates only to ask what attributes this CANN knows ----

class Operator {
 public:
  virtual ~Operator() = default;
  graphStatus UpdateInputDesc(const char *name, const TensorDesc &desc);
  graphStatus GetAllIrAttrNamesAndTypes(Options &attributes) const;
  std::shared_ptr<std::string> operator_impl_;
};
graphStatus Operator::UpdateInputDesc(const char *, const TensorDesc &) { return SUCCESS; }
graphStatus Operator::GetAllIrAttrNamesAndTypes(Options &) const { return SUCCESS; }
class OperatorFactory {
 public:
  static Operator CreateOperator(const char *const name, const char *const type);
  static bool IsExistOp(const char *const type);
};
Operator OperatorFactory::CreateOperator(const char *const, const char *const type) {
  Operator created;
  created.operator_impl_ = std::make_shared<std::string>(type);
  return created;
}
bool OperatorFactory::IsExistOp(const char *const) { return true; }
}  // namespace ge
