/* Whether x / d rounded to a whole number is what `rounding.row_codes` makes of x and the reciprocal of d. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define ROUNDER 12582912.0f

static float from_bits(uint32_t bits) {
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

/* Tries every `step`-th of the 2^23 numbers d in [1, 2). Rounding can change where x / d is half way between k + 1/2
   and a neighbour of it, for k from 0 to 127; tried are the x next to each such place, and one on each side of it.
   Returns how many codes differ, and in `plain` how many would without the correction. */
long differing_codes(long step, long *tried, long *plain) {
    double places[256];
    long differ = 0, without = 0, count = 0;
    for (int k = 0; k < 128; k++) {
        float half = (float)k + 0.5f;
        places[2 * k] = ((double)nextafterf(half, 0.0f) + half) / 2;
        places[2 * k + 1] = ((double)nextafterf(half, 1e9f) + half) / 2;
    }
    for (long i = 0; i < 1l << 23; i += step) {
        float d = from_bits(0x3f800000u + (uint32_t)i), inverse = 1.0f / d;
        int bad = 0, worse = 0;
        for (int j = 0; j < 256; j++) {
            float nearest = (float)(places[j] * (double)d); /* the product is exact */
            uint32_t bits;
            memcpy(&bits, &nearest, 4);
            for (int side = -1; side <= 1; side++) {
                float x = from_bits(bits + (uint32_t)side), right = x / d + ROUNDER, quotient = x * inverse;
                worse += quotient + ROUNDER != right;
                quotient = fmaf(fmaf(-quotient, d, x), inverse, quotient);
                bad += quotient + ROUNDER != right;
            }
        }
        differ += bad, without += worse, count += 3 * 256;
    }
    *tried = count, *plain = without;
    return differ;
}
