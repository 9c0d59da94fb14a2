// The Python module nvae_fast._C. Importing it runs the registrations of csrc/cpu and csrc/cuda; what it
// offers itself are plain facts about the binary. CPython's limited API only, so one binary serves every
// Python from 3.10 on.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include "bus_errors.h"
#include "capability.h"
#ifdef NVAE_HAVE_CUDA
#include "cuda/device_check.h"
#endif

// What the loader looks for in the file before it loads it (nvae_fast/ops/_schemas.py).
#define NVAE_SCHEMAS_MARK "nvae_fast schemas "
__attribute__((used)) static const char schemas[] = NVAE_SCHEMAS_MARK NVAE_SCHEMAS;

// Setters that own their value: 0 on success, as CPython's.
static int put(PyObject* dict, const char* key, PyObject* value) {
  if (!value) return -1;
  const int failed = PyDict_SetItemString(dict, key, value);
  Py_DECREF(value);
  return failed;
}

// Comma-separated text -> list of strings.
static PyObject* split(const char* text) {
  PyObject* whole = PyUnicode_FromString(text);
  PyObject* comma = PyUnicode_FromString(",");
  PyObject* parts = whole && comma ? PyUnicode_Split(whole, comma, -1) : nullptr;
  Py_XDECREF(whole);
  Py_XDECREF(comma);
  return parts;
}

static PyObject* info(PyObject*, PyObject*) {
  using nvae::capability_name;
  PyObject* dict = PyDict_New();
  if (!dict) return nullptr;
#ifdef NVAE_HAVE_X86
  const char* compiled = "baseline,avx2,avx512";
#else
  const char* compiled = "baseline";
#endif
#ifdef NVAE_HAVE_CUDA
  const long cuda = 1;
  PyObject* archs = split(NVAE_CUDA_ARCHS);
#else
  const long cuda = 0;
  PyObject* archs = PyList_New(0);
#endif
  if (put(dict, "cuda_archs", archs) || put(dict, "cuda", PyBool_FromLong(cuda)) ||
      put(dict, "cpu_capability", PyUnicode_FromString(capability_name(nvae::capability()))) ||
      put(dict, "cpu_capabilities", split(compiled)) ||
      put(dict, "fast_bfloat16", PyBool_FromLong(nvae::fast_bfloat16())) ||
      put(dict, "amx", PyBool_FromLong(nvae::has_amx())) ||
      put(dict, "fast_library_products", PyBool_FromLong(nvae::fast_library_products())) ||
      put(dict, "schemas", PyUnicode_FromString(schemas + sizeof NVAE_SCHEMAS_MARK - 1)) ||
      put(dict, "torch_target", PyUnicode_FromString(NVAE_TORCH_TARGET))) {
    Py_DECREF(dict);
    return nullptr;
  }
  return dict;
}

static PyObject* report_bus_errors(PyObject*, PyObject*) {
  return PyBool_FromLong(nvae::report_bus_errors() == 0);
}

#ifdef NVAE_HAVE_CUDA
static PyObject* device_check(PyObject*, PyObject*) {
  char text[256];
  nvae_device_check(text, sizeof text);
  return PyUnicode_FromString(text);
}
#endif

static PyMethodDef methods[] = {
    {"info", info, METH_NOARGS,
     "info() -> dict: what this binary was built with and which vector code it uses."},
    {"report_bus_errors", report_bus_errors, METH_NOARGS,
     "report_bus_errors() -> bool: name the mapped file when a read of it ends the process with SIGBUS."},
#ifdef NVAE_HAVE_CUDA
    {"device_check", device_check, METH_NOARGS,
     "device_check() -> str: whether this binary holds code for the current GPU. Initialises CUDA."},
#endif
    {nullptr, nullptr, 0, nullptr}};

static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                             "_C",
                             "Compiled kernels of nvae_fast.",
                             -1,
                             methods,
                             nullptr,
                             nullptr,
                             nullptr,
                             nullptr};

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  return PyModule_Create(&module);
}
