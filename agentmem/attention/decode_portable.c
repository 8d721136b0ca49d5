/* A decode step's arithmetic for any CPU: vectors of four floats, as SSE2 and NEON have them. */
#define WIDE 4
#define LEVEL 0
#define TARGET
#define CODE decode_portable
#include "decode_kernel.h"
