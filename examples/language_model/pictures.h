/* Three pictures as gnuplot scripts that carry their data, and as SVG where gnuplot is installed. */
#ifndef PICTURES_H
#define PICTURES_H

#include "report.h"

/* Into the current folder. summary [NUM_KINDS], balance [NUM_KINDS]. Returns whether SVG was
 * drawn. */
bool draw_pictures(const summary_t *summary, const balance_t *balance, const usage_t *usage, const text_t *text);

#endif
