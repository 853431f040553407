// The tile functions for x86-64-v3.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#pragma GCC target("arch=x86-64-v3")
#define BNEXT_ISA v3
#define BNEXT_VECTOR_BYTES 32
#include "cpu/tiles.inc"
#endif
