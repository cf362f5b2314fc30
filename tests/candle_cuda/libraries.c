// Stands in for the CUDA libraries that candle-core/cuda links: what opening one of its devices calls, which succeeds and
// does nothing. Whatever else is called is an undefined symbol.
typedef int Status;

Status cublasCreate_v2(void** handle) { *handle = handle; return 0; }
Status cublasSetStream_v2(void* handle, void* stream) { return 0; }
Status cublasDestroy_v2(void* handle) { return 0; }

Status curandCreateGenerator(void** generator, int kind) { *generator = generator; return 0; }
Status curandSetStream(void* generator, void* stream) { return 0; }
Status curandSetPseudoRandomGeneratorSeed(void* generator, unsigned long long seed) { return 0; }
Status curandDestroyGenerator(void* generator) { return 0; }
