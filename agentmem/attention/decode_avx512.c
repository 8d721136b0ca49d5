/* A decode step's arithmetic for CPUs with AVX-512. */
#ifdef __x86_64__
#define WIDE 16
#define LEVEL 2
#define TARGET __attribute__((target("avx512f,avx512dq,avx512vl,fma")))
#define CODE decode_avx512
#include "decode_kernel.h"
#else
#include "decode_piece.h"
#endif
