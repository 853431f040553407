// The tile functions for any machine of the architecture the extension was compiled for (x86-64: SSE2).
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define BNEXT_ISA baseline
#define BNEXT_VECTOR_BYTES 16
#include "cpu/tiles.inc"
