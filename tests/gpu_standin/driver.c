// A stand-in for libcuda.so.1: accepts what a driver accepts, refuses what a driver refuses, counts, and runs nothing.
//
// Triton's launcher links against it. Modules are real cubins: names of kernels, registers, static shared memory and the
// largest block come from them. Device memory is what `standin_owns` says is device memory.

#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef uint64_t CUdeviceptr;

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    INVALID_IMAGE = 200,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    TOO_MANY_RESOURCES = 701,
    NOT_PERMITTED = 900,  // CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
};

// Attributes of a device that Triton asks for, by the numbers of CUdevice_attribute. The values are an H200's.
enum { SHARED = 8, WARP = 10, REGISTERS = 12, CLOCK = 13, MULTIPROCESSORS = 16, MEMORY_CLOCK = 36, BUS = 37,
       MAJOR = 75, MINOR = 76, SHARED_PER_MULTIPROCESSOR = 81, SHARED_OPTIN = 97 };

typedef struct {
    int capability, shared_optin, shared_per_multiprocessor, multiprocessors;
} Device;
static Device device = {90, 232448, 233472, 132};

typedef struct {
    char *name, *label;
    void* module;
    int registers, local, shared_static, max_threads, required, shared_dynamic;
    long launches, launches_in_capture;
} Function;

typedef struct {
    char* image;
    size_t size;
} Module;

static Function* functions[65536];
static int function_count, capturing;
static long loads, loads_in_capture, launches, launches_in_capture, refused;
static CUresult (*owns)(CUdeviceptr);
static char refusal[512];

void standin_device(int capability, int shared_optin, int shared_per_multiprocessor, int multiprocessors) {
    device = (Device){capability, shared_optin, shared_per_multiprocessor, multiprocessors};
}
void standin_capture(int on) { capturing = on; }
void standin_owns(CUresult (*callback)(CUdeviceptr)) { owns = callback; }
const char* standin_refusal(void) { return refusal; }
// Names the function loaded last, whose own name others may have.
void standin_label(const char* label) { functions[function_count - 1]->label = strdup(label); }

void standin_reset(void) {
    loads = loads_in_capture = launches = launches_in_capture = refused = 0;
    refusal[0] = 0;
    for (int i = 0; i < function_count; ++i) functions[i]->launches = functions[i]->launches_in_capture = 0;
}

// The counts as JSON; `size` characters of `out` may be written. Returns how many are needed.
long standin_report(char* out, long size) {
    long used = 0;
#define PUT(...) used += snprintf(out + used, used < size ? size - used : 0, __VA_ARGS__)
    PUT("{\"loads\": %ld, \"loads_in_capture\": %ld, \"launches\": %ld, \"launches_in_capture\": %ld, \"refused\": %ld, "
        "\"kernels\": [", loads, loads_in_capture, launches, launches_in_capture, refused);
    for (int i = 0; i < function_count; ++i) {
        Function* f = functions[i];
        PUT("%s{\"name\": \"%s\", \"registers\": %d, \"spills\": %d, \"launches\": %ld, \"launches_in_capture\": %ld}",
            i ? ", " : "", f->label, f->registers, f->local, f->launches, f->launches_in_capture);
    }
    PUT("]}");
    return used + 1;
}

static CUresult refuse(CUresult code, const char* format, const char* name, long a, long b) {
    ++refused;
    snprintf(refusal, sizeof refusal, format, name, a, b);
    return code;
}

// Cubins.

static const Elf64_Shdr* sections(const char* image, int* count, const char** names) {
    const Elf64_Ehdr* header = (const Elf64_Ehdr*)image;
    const Elf64_Shdr* all = (const Elf64_Shdr*)(image + header->e_shoff);
    *count = header->e_shnum;
    *names = image + all[header->e_shstrndx].sh_offset;
    return all;
}

static const Elf64_Shdr* section(const char* image, const char* prefix, const char* name) {
    int count;
    const char* names;
    const Elf64_Shdr* all = sections(image, &count, &names);
    size_t length = strlen(prefix);
    for (int i = 0; i < count; ++i) {
        const char* candidate = names + all[i].sh_name;
        if (!strncmp(candidate, prefix, length) && !strcmp(candidate + length, name)) return all + i;
    }
    return NULL;
}

static size_t image_size(const char* image) {
    const Elf64_Ehdr* header = (const Elf64_Ehdr*)image;
    size_t end = header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
    size_t programs = header->e_phoff + (size_t)header->e_phnum * header->e_phentsize;
    if (programs > end) end = programs;
    int count;
    const char* names;
    const Elf64_Shdr* all = sections(image, &count, &names);
    for (int i = 0; i < count; ++i)
        if (all[i].sh_type != SHT_NOBITS && all[i].sh_offset + all[i].sh_size > end) end = all[i].sh_offset + all[i].sh_size;
    return end;
}

// The symbol of `name`, 0 when there is none.
static uint32_t symbol(const char* image, const char* name) {
    const Elf64_Shdr *table = section(image, ".symtab", ""), *strings = section(image, ".strtab", "");
    if (!table || !strings) return 0;
    const Elf64_Sym* all = (const Elf64_Sym*)(image + table->sh_offset);
    for (uint32_t i = 1; i < table->sh_size / sizeof *all; ++i)
        if (ELF64_ST_TYPE(all[i].st_info) == STT_FUNC && !strcmp(image + strings->sh_offset + all[i].st_name, name)) return i;
    return 0;
}

// An attribute of .nv.info: entries of (format, attribute, 16 bits, and with format 4 that many bytes more). The value is
// the first word for `of` = 0, else the second word of the entry whose first word is the symbol `of`; -1: absent.
static long info(const char* image, const Elf64_Shdr* at, int attribute, uint32_t of) {
    if (!at) return -1;
    const unsigned char *p = (const unsigned char*)image + at->sh_offset, *end = p + at->sh_size;
    while (p + 4 <= end) {
        int format = p[0], found = p[1];
        uint16_t size = (uint16_t)(p[2] | p[3] << 8);
        const unsigned char* data = p + 4;
        p = data + (format == 4 ? size : 0);
        if (found != attribute || format != 4 || size < 4 || p > end) continue;
        uint32_t words[2] = {0, 0};
        memcpy(words, data, size < 8 ? 4 : 8);
        if (!of) return words[0];
        if (words[0] == of && size >= 8) return words[1];
    }
    return -1;
}

CUresult cuModuleLoadData(void** module, const void* data) {
    ++loads;
    if (capturing) {
        ++loads_in_capture;
        return refuse(NOT_PERMITTED, "module load%s while a stream is capturing", "", 0, 0);
    }
    if (memcmp(data, ELFMAG, SELFMAG)) return refuse(INVALID_IMAGE, "module image%s is not a cubin", "", 0, 0);
    Module* m = malloc(sizeof *m);
    m->size = image_size(data);
    m->image = malloc(m->size);
    memcpy(m->image, data, m->size);
    *module = m;
    return SUCCESS;
}

CUresult cuModuleUnload(void* module) {
    Module* m = module;
    for (int i = 0; i < function_count; ++i)
        if (functions[i]->module == m) functions[i]->module = NULL;
    free(m->image);
    free(m);
    return SUCCESS;
}

CUresult cuModuleGetFunction(void** function, void* module, const char* name) {
    Module* m = module;
    uint32_t of = symbol(m->image, name);
    if (!of || !section(m->image, ".text.", name)) return refuse(NOT_FOUND, "no kernel %s in its module", name, 0, 0);
    const Elf64_Shdr *common = section(m->image, ".nv.info", ""), *own = section(m->image, ".nv.info.", name);
    const Elf64_Shdr* shared = section(m->image, ".nv.shared.", name);
    long registers = info(m->image, common, 0x2f, of), local = info(m->image, common, 0x11, of);
    long threads = info(m->image, own, 0x05, 0), required = info(m->image, own, 0x10, 0);
    if (registers < 0 || function_count == (int)(sizeof functions / sizeof *functions))
        return refuse(INVALID_IMAGE, "kernel %s: its module lacks the number of registers", name, 0, 0);
    Function* f = calloc(1, sizeof *f);
    f->name = f->label = strdup(name);
    f->module = m;
    f->registers = (int)registers;
    f->local = local > 0 ? (int)local : 0;
    f->max_threads = threads > 0 ? (int)threads : required > 0 ? (int)required : 1024;
    f->required = required > 0 ? (int)required : 0;
    f->shared_static = shared ? (int)shared->sh_size : 0;
    f->shared_dynamic = 49152;
    functions[function_count++] = f;
    *function = f;
    return SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, int attribute, void* function) {
    Function* f = function;
    switch (attribute) {
        case 0: *value = f->max_threads; return SUCCESS;
        case 1: *value = f->shared_static; return SUCCESS;
        case 3: *value = f->local; return SUCCESS;
        case 4: *value = f->registers; return SUCCESS;
        default: return refuse(INVALID_VALUE, "kernel %s: attribute %ld is not known here", f->name, attribute, 0);
    }
}

CUresult cuFuncSetAttribute(void* function, int attribute, int value) {
    Function* f = function;
    if (attribute == 8) {  // the most dynamic shared memory
        if (value + f->shared_static > device.shared_optin)
            return refuse(INVALID_VALUE, "kernel %s: %ld bytes of shared memory asked for, the device has %ld", f->name,
                          value + f->shared_static, device.shared_optin);
        f->shared_dynamic = value;
    }
    return SUCCESS;
}
CUresult cuFuncSetCacheConfig(void* function, int config) { return SUCCESS; }

// Launches.

typedef struct {
    unsigned grid[3], block[3], shared;
    void* stream;
    void* attributes;
    unsigned attribute_count;
} Config;  // CUlaunchConfig

CUresult cuLaunchKernelEx(const Config* c, void* function, void** arguments, void** extra) {
    Function* f = NULL;
    for (int i = 0; i < function_count && !f; ++i)
        if (functions[i] == function) f = functions[i];
    if (!f || !f->module) return refuse(INVALID_HANDLE, "launch of a function%s that no loaded module has", "", 0, 0);
    ++launches;
    ++f->launches;
    if (capturing) ++launches_in_capture, ++f->launches_in_capture;
    long threads = (long)c->block[0] * c->block[1] * c->block[2];
    // Registers are given to warps in units of 256.
    long taken = (f->registers * 32 + 255) / 256 * 256 * ((threads + 31) / 32);
    if (!c->grid[0] || !c->grid[1] || !c->grid[2] || c->grid[0] > 2147483647u || c->grid[1] > 65535 || c->grid[2] > 65535)
        return refuse(INVALID_VALUE, "kernel %s: a grid of %ld, %ld", f->name, c->grid[0], c->grid[1]);
    if (!threads || threads > 1024 || threads > f->max_threads || c->block[2] > 64)
        return refuse(threads > 1024 ? INVALID_VALUE : TOO_MANY_RESOURCES, "kernel %s: %ld threads, it takes %ld", f->name,
                      threads, f->max_threads);
    if (f->required && (long)c->block[0] != f->required)
        return refuse(INVALID_VALUE, "kernel %s: %ld threads, compiled for %ld", f->name, threads, f->required);
    if (taken > 65536)
        return refuse(TOO_MANY_RESOURCES, "kernel %s: %ld threads of %ld registers", f->name, threads, f->registers);
    if ((long)c->shared > f->shared_dynamic || (long)c->shared + f->shared_static > device.shared_optin)
        return refuse(INVALID_VALUE, "kernel %s: %ld bytes of shared memory, allowed are %ld", f->name, c->shared,
                      f->shared_dynamic);
    return SUCCESS;
}

CUresult cuPointerGetAttribute(void* data, int attribute, CUdeviceptr pointer) {
    if (attribute != 3) return INVALID_VALUE;  // CU_POINTER_ATTRIBUTE_DEVICE_POINTER
    if (owns && owns(pointer)) return refuse(INVALID_VALUE, "pointer%s %lx is not of device memory", "", (long)pointer, 0);
    *(CUdeviceptr*)data = pointer;
    return SUCCESS;
}

// Everything else that Triton asks a driver.

// The CUDA runtime inside PyTorch asks this first and then leaves the stand-in alone: CUDA_ERROR_NO_DEVICE.
CUresult cuInit(unsigned flags) { return 100; }
CUresult cuCtxGetCurrent(void** context) { *context = (void*)1; return SUCCESS; }
CUresult cuCtxSetCurrent(void* context) { return SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, int limit) { *value = 1 << 20; return SUCCESS; }
CUresult cuCtxSetLimit(int limit, size_t value) { return SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(void** context, int number) { *context = (void*)1; return SUCCESS; }
CUresult cuDeviceGet(int* value, int number) {
    *value = number;
    return number ? INVALID_VALUE : SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, int attribute, int number) {
    switch (attribute) {
        case SHARED: *value = 49152; break;
        case WARP: *value = 32; break;
        case REGISTERS: *value = 65536; break;
        case CLOCK: *value = 1980000; break;
        case MULTIPROCESSORS: *value = device.multiprocessors; break;
        case MEMORY_CLOCK: *value = 3201000; break;
        case BUS: *value = 5120; break;
        case MAJOR: *value = device.capability / 10; break;
        case MINOR: *value = device.capability % 10; break;
        case SHARED_PER_MULTIPROCESSOR: *value = device.shared_per_multiprocessor; break;
        case SHARED_OPTIN: *value = device.shared_optin; break;
        default: return refuse(INVALID_VALUE, "device attribute%s %ld is not known here", "", attribute, 0);
    }
    return SUCCESS;
}
CUresult cuGetErrorString(CUresult code, const char** text) {
    static char full[600];
    const char* kind = code == NOT_PERMITTED ? "operation not permitted when stream is capturing" : "refused";
    snprintf(full, sizeof full, "%s (%d): %s", kind, code, refusal);
    *text = full;
    return SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* number, void* function, const void* config) { *number = 1; return SUCCESS; }
CUresult cuTensorMapEncodeTiled(void) { return INVALID_VALUE; }  // no kernel here uses TMA descriptors
CUresult cuTensorMapEncodeIm2col(void) { return INVALID_VALUE; }
CUresult cuDriverGetVersion(int* version) { *version = 13000; return SUCCESS; }
CUresult cuDeviceGetCount(int* count) { *count = 1; return SUCCESS; }
CUresult cuCtxGetDevice(int* number) { *number = 0; return SUCCESS; }
CUresult cuStreamIsCapturing(void* stream, int* status) { *status = capturing; return SUCCESS; }
CUresult cuPointerGetAttributes(unsigned count, const int* attributes, void** data, CUdeviceptr pointer) {
    for (unsigned i = 0; i < count; ++i) {
        CUresult result = cuPointerGetAttribute(data[i], attributes[i], pointer);
        if (result) return result;
    }
    return SUCCESS;
}

// Of PyTorch's CUDA build: c10::cuda::device_count(), in place of its own, which asks a driver. PyTorch must find no device
// when it chooses how to guard "cuda", and autograd must find the one whose streams it asks for.
static signed char devices;
void standin_appear(void) { devices = 127; }
signed char _ZN3c104cuda12device_countEv(void) { return devices; }
CUresult cuDevicePrimaryCtxGetState(int number, unsigned* flags, int* active) {
    *flags = *active = 0;
    return SUCCESS;
}

// Only named by PyTorch, never called.
#define UNUSED(name) CUresult name(void) { return INVALID_VALUE; }
UNUSED(cuLaunchCooperativeKernel) UNUSED(cuLaunchKernel) UNUSED(cuLinkAddData_v2) UNUSED(cuLinkComplete) UNUSED(cuLinkCreate_v2)
UNUSED(cuModuleLoad) UNUSED(cuModuleLoadDataEx) UNUSED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
