// Bodies of GE's value classes; see ge.h.
#include "ge.h"

#include <cstring>

namespace ge {
AscendString::AscendString(const char *text)
    : name_(text ? std::make_shared<std::string>(text) : nullptr) {}
AscendString::AscendString(const char *text, size_t length)
    : name_(text ? std::make_shared<std::string>(text, length) : nullptr) {}
const char *AscendString::GetString() const { return name_ ? name_->c_str() : ""; }
size_t AscendString::GetLength() const { return name_ ? name_->size() : 0; }
bool AscendString::operator<(const AscendString &other) const {
  return strcmp(GetString(), other.GetString()) < 0;
}
bool AscendString::operator==(const AscendString &other) const {
  return strcmp(GetString(), other.GetString()) == 0;
}

Shape::Shape() : impl_(std::make_shared<ShapeImpl>()) {}
Shape::Shape(const std::vector<int64_t> &dims) : Shape() { impl_->dims = dims; }
std::vector<int64_t> Shape::GetDims() const {
  return impl_ ? impl_->dims : std::vector<int64_t>();
}

TensorDesc::TensorDesc() : impl(std::make_shared<DescImpl>()) {}
TensorDesc::TensorDesc(const TensorDesc &other) : impl(std::make_shared<DescImpl>(*other.impl)) {}
Shape TensorDesc::GetShape() const { return Shape(impl->shape); }
Format TensorDesc::GetFormat() const { return Format(impl->format); }
DataType TensorDesc::GetDataType() const { return DataType(impl->dtype); }
Placement TensorDesc::GetPlacement() const { return Placement(impl->placement); }
void TensorDesc::SetFormat(Format format) { impl->format = format; }
void TensorDesc::SetOriginFormat(Format format) { impl->origin_format = format; }
void TensorDesc::SetOriginShape(const Shape &shape) { impl->origin_shape = shape.impl_->dims; }
void TensorDesc::SetDataType(DataType dtype) { impl->dtype = dtype; }
void TensorDesc::SetPlacement(Placement placement) { impl->placement = placement; }

Tensor::Tensor() : impl(std::make_shared<TensorImpl>()) {}
TensorDesc Tensor::GetTensorDesc() const {
  TensorDesc desc;
  *desc.impl = impl->desc;
  return desc;
}
graphStatus Tensor::SetTensorDesc(const TensorDesc &desc) {
  impl->desc = *desc.impl;
  return SUCCESS;
}
const uint8_t *Tensor::GetData() const { return impl->data; }
uint8_t *Tensor::GetData() { return impl->data; }
size_t Tensor::GetSize() const { return impl->bytes; }
std::unique_ptr<uint8_t[], Deleter> Tensor::ResetData() {
  Deleter deleter = impl->deleter ? impl->deleter : Deleter([](uint8_t *) {});
  std::unique_ptr<uint8_t[], Deleter> data(impl->data, deleter);
  impl->data = nullptr;
  impl->bytes = 0;
  impl->deleter = nullptr;
  return data;
}
graphStatus Tensor::SetData(uint8_t *data, size_t bytes, const Deleter &deleter) {
  impl->release();
  impl->data = data;
  impl->bytes = bytes;
  impl->deleter = deleter;
  return SUCCESS;
}
graphStatus Tensor::ResetData(uint8_t *data, size_t bytes, const Deleter &deleter) {
  return SetData(data, bytes, deleter);
}
graphStatus Tensor::SetOriginShapeDimNum(const size_t rank) {
  impl->desc.origin_shape.resize(rank);
  return SUCCESS;
}
size_t Tensor::GetOriginShapeDimNum() const { return impl->desc.origin_shape.size(); }
graphStatus Tensor::SetOriginShapeDim(const size_t dim, const int64_t size) {
  impl->desc.origin_shape.at(dim) = size;
  return SUCCESS;
}
graphStatus Tensor::SetShapeDimNum(const size_t rank) {
  impl->desc.shape.resize(rank);
  return SUCCESS;
}
size_t Tensor::GetShapeDimNum() const { return impl->desc.shape.size(); }
graphStatus Tensor::SetShapeDim(const size_t dim, const int64_t size) {
  impl->desc.shape.at(dim) = size;
  return SUCCESS;
}
int64_t Tensor::GetShapeDim(const size_t dim) const { return impl->desc.shape.at(dim); }
graphStatus Tensor::SetFormat(const Format &format) {
  impl->desc.format = format;
  return SUCCESS;
}
Format Tensor::GetFormat() const { return Format(impl->desc.format); }
graphStatus Tensor::SetDataType(const DataType &dtype) {
  impl->desc.dtype = dtype;
  return SUCCESS;
}
DataType Tensor::GetDataType() const { return DataType(impl->desc.dtype); }
graphStatus Tensor::SetPlacement(const Placement &placement) {
  impl->desc.placement = placement;
  return SUCCESS;
}
Placement Tensor::GetPlacement() const { return Placement(impl->desc.placement); }
}  // namespace ge
