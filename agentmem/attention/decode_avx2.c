/* A decode step's arithmetic for CPUs with AVX2. */
#ifdef __x86_64__
#define WIDE 8
#define LEVEL 1
#define TARGET __attribute__((target("avx2,fma")))
#define CODE decode_avx2
#include "decode_kernel.h"
#else
#include "decode_piece.h"
#endif
