// The only file that knows pybind11: tensors arrive as (address, dtype code, sizes, strides), one line per entry point.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/tensor.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "gau_attention/problem.h"
#include "gau_inputs/problem.h"
#include "linear_attention/problem.h"
#include "mixed_chunk_attention/problem.h"
#include "nystrom_attention/problem.h"
#include "rope/problem.h"
#ifdef KX_EMULATION
#include "emulation/block.h"
#endif

namespace py = pybind11;

namespace pybind11::detail {

template <>
struct type_caster<kx::Tensor> {
  PYBIND11_TYPE_CASTER(kx::Tensor, const_name("Tensor"));

  bool load(handle source, bool) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) {
      return false;
    }
    PyObject* const* field = reinterpret_cast<PyTupleObject*>(source.ptr())->ob_item;
    if (!PyTuple_Check(field[2]) || !PyTuple_Check(field[3])) {
      return false;
    }
    const auto rank = PyTuple_GET_SIZE(field[2]);
    if (rank > kx::Tensor::kMaxRank || PyTuple_GET_SIZE(field[3]) != rank) {
      return false;
    }
    value.data = PyLong_AsVoidPtr(field[0]);
    value.dtype = static_cast<kx::DType>(PyLong_AsLong(field[1]));
    value.rank = static_cast<int>(rank);
    for (Py_ssize_t d = 0; d < rank; ++d) {
      value.size[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(field[2], d));
      value.stride[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(field[3], d));
    }
    if (PyErr_Occurred() != nullptr) {
      throw error_already_set();
    }
    return true;
  }
};

}  // namespace pybind11::detail

#define KX_STRING_(x) #x
#define KX_STRING(x) KX_STRING_(x)

PYBIND11_MODULE(KX_MODULE_NAME, m) {
#ifndef KX_NO_CPU
  m.attr("cpu_isa") = kx::isa_name();
  m.def("cpu_peak_bytes", &kx::peak_bytes);
  m.def("rope_cpu", &kx::rope::cpu, py::call_guard<py::gil_scoped_release>());
  m.def("linear_attention_cpu", &kx::linear_attention::cpu, py::call_guard<py::gil_scoped_release>());
  m.def("linear_attention_cpu_backward", &kx::linear_attention::cpu_backward, py::call_guard<py::gil_scoped_release>());
  m.def("gau_attention_cpu", &kx::gau_attention::cpu, py::call_guard<py::gil_scoped_release>());
  m.def("gau_attention_cpu_backward", &kx::gau_attention::cpu_backward, py::call_guard<py::gil_scoped_release>());
  m.def("mixed_chunk_attention_cpu", &kx::mixed_chunk_attention::cpu, py::call_guard<py::gil_scoped_release>());
  m.def("mixed_chunk_attention_cpu_backward", &kx::mixed_chunk_attention::cpu_backward,
        py::call_guard<py::gil_scoped_release>());
  m.def("gau_inputs_cpu", &kx::gau_inputs::cpu, py::call_guard<py::gil_scoped_release>());
  m.def("gau_inputs_cpu_backward", &kx::gau_inputs::cpu_backward, py::call_guard<py::gil_scoped_release>());
  m.def("nystrom_attention_cpu", &kx::nystrom_attention::cpu, py::call_guard<py::gil_scoped_release>());
  m.def("nystrom_attention_cpu_matrices", &kx::nystrom_attention::cpu_matrices,
        py::call_guard<py::gil_scoped_release>());
  m.def("nystrom_attention_cpu_backward", &kx::nystrom_attention::cpu_backward,
        py::call_guard<py::gil_scoped_release>());
#endif
#ifdef KX_HAS_CUDA
  m.attr("has_cuda") = true;
  m.attr("cuda_architectures") = KX_STRING(KX_CUDA_ARCHITECTURES);
  m.def("rope_cuda", &kx::rope::cuda);
  m.def("linear_attention_cuda", &kx::linear_attention::cuda);
  m.def("linear_attention_cuda_fits", &kx::linear_attention::cuda_fits);
  m.def("gau_attention_cuda", &kx::gau_attention::cuda);
  m.def("gau_attention_cuda_fused", &kx::gau_attention::cuda_fused);
  m.def("gau_attention_cuda_fused_columns", &kx::gau_attention::cuda_fused_columns);
  m.def("gau_attention_cuda_resident", &kx::gau_attention::cuda_resident);
  m.def("gau_attention_cuda_resident_form", &kx::gau_attention::cuda_resident_form);
  m.def("gau_attention_cuda_backward", &kx::gau_attention::cuda_backward);
  m.def("gau_attention_cuda_fits", &kx::gau_attention::cuda_fits);
  m.def("gau_attention_cuda_tiles", &kx::gau_attention::cuda_tiles);
  m.attr("gau_attention_cuda_tile") = kx::gau_attention::kCudaTile;
  m.def("mixed_chunk_attention_cuda", &kx::mixed_chunk_attention::cuda);
  m.def("mixed_chunk_attention_cuda_backward", &kx::mixed_chunk_attention::cuda_backward);
  m.def("mixed_chunk_attention_cuda_chunks", &kx::mixed_chunk_attention::cuda_chunks);
  m.def("linear_attention_cuda_step", &kx::linear_attention::cuda_step);
  m.def("gau_inputs_cuda", &kx::gau_inputs::cuda);
  m.def("gau_inputs_cuda_backward", &kx::gau_inputs::cuda_backward);
  m.def("gau_inputs_cuda_sums", &kx::gau_inputs::cuda_sums);
  m.def("nystrom_attention_cuda_landmarks", &kx::nystrom_attention::cuda_landmarks);
  m.def("nystrom_attention_cuda_matrices", &kx::nystrom_attention::cuda_matrices);
  m.def("nystrom_attention_cuda", &kx::nystrom_attention::cuda);
  m.def("nystrom_attention_cuda_backward", &kx::nystrom_attention::cuda_backward);
  m.def("nystrom_attention_cuda_scratch", &kx::nystrom_attention::cuda_scratch);
  m.def("nystrom_attention_cuda_fits", &kx::nystrom_attention::cuda_fits);
  m.attr("nystrom_attention_cuda_tile") = kx::nystrom_attention::kCudaTile;
  m.attr("gau_inputs_cuda_heads") = kx::gau_inputs::kCudaHeads;
#ifdef KX_EMULATION
  m.def("set_seed", &kx::emulation::set_seed);
  m.def("launches", &kx::emulation::launches);
  m.def("set_wgmma", &kx::emulation::set_wgmma);
  m.def("set_clusters", &kx::emulation::set_clusters);
#endif
#else
  m.attr("has_cuda") = false;
  m.attr("cuda_architectures") = "";
#endif
}
