// GE's value classes: text, shapes, tensors.
//
// Every value class of GE is one shared_ptr to an implementation that its header hides, so the
// classes can be declared here from their public surface. The wheel's headers are the reference.
#ifndef CANNSIM_GE_H
#define CANNSIM_GE_H

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ge {
using Status = uint32_t;
using graphStatus = uint32_t;
enum DataType : int {};
enum Format : int {};
enum Placement : uint32_t {};
constexpr Status SUCCESS = 0, FAILED = 1;
constexpr int FORMAT_ND = 2;

class AscendString {
 public:
  AscendString() = default;
  AscendString(const char *text);
  AscendString(const char *text, size_t length);
  const char *GetString() const;
  size_t GetLength() const;
  bool operator<(const AscendString &other) const;
  bool operator==(const AscendString &other) const;

 private:
  std::shared_ptr<std::string> name_;
};

using Options = std::map<AscendString, AscendString>;

struct ShapeImpl {
  std::vector<int64_t> dims;
};

class Shape {
 public:
  Shape();
  explicit Shape(const std::vector<int64_t> &dims);
  std::vector<int64_t> GetDims() const;
  std::shared_ptr<ShapeImpl> impl_;
};

struct DescImpl {
  std::vector<int64_t> shape, origin_shape;
  int dtype = 0, format = FORMAT_ND, origin_format = FORMAT_ND;
  uint32_t placement = 0;
};

class TensorDesc {
 public:
  TensorDesc();
  TensorDesc(const TensorDesc &other);
  Shape GetShape() const;
  Format GetFormat() const;
  DataType GetDataType() const;
  Placement GetPlacement() const;
  void SetFormat(Format format);
  void SetOriginFormat(Format format);
  void SetOriginShape(const Shape &shape);
  void SetDataType(DataType dtype);
  void SetPlacement(Placement placement);
  std::shared_ptr<DescImpl> impl;
};

using Deleter = std::function<void(uint8_t *)>;

struct TensorImpl {
  DescImpl desc;
  uint8_t *data = nullptr;
  size_t bytes = 0;
  Deleter deleter;
  void release() {
    if (data && deleter) deleter(data);
    data = nullptr;
  }
  ~TensorImpl() { release(); }
};

class Tensor {
 public:
  using DeleteFunc = Deleter;
  Tensor();
  TensorDesc GetTensorDesc() const;
  graphStatus SetTensorDesc(const TensorDesc &desc);
  const uint8_t *GetData() const;
  uint8_t *GetData();
  size_t GetSize() const;
  std::unique_ptr<uint8_t[], Tensor::DeleteFunc> ResetData();
  graphStatus SetData(uint8_t *data, size_t bytes, const Tensor::DeleteFunc &deleter);
  graphStatus ResetData(uint8_t *data, size_t bytes, const Tensor::DeleteFunc &deleter);
  graphStatus SetOriginShapeDimNum(const size_t rank);
  size_t GetOriginShapeDimNum() const;
  graphStatus SetOriginShapeDim(const size_t dim, const int64_t size);
  graphStatus SetShapeDimNum(const size_t rank);
  size_t GetShapeDimNum() const;
  graphStatus SetShapeDim(const size_t dim, const int64_t size);
  int64_t GetShapeDim(const size_t dim) const;
  graphStatus SetFormat(const Format &format);
  Format GetFormat() const;
  graphStatus SetDataType(const DataType &dtype);
  DataType GetDataType() const;
  graphStatus SetPlacement(const Placement &placement);
  Placement GetPlacement() const;
  std::shared_ptr<TensorImpl> impl;
};
}  // namespace ge
#endif
