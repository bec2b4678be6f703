/* cumoe: the Sparsely-Gated Mixture-of-Experts layer (Shazeer et al., 2017, arXiv 1701.06538).
 *
 * Read in this order:
 *   status.h     what calls answer                types.h      letters, types, kinds
 *   handle.h     a device, its memory, streams    config.h     what a layer computes
 *   weights.h    parameters and gradients         layer.h      forward and backward
 *   optimizer.h  a step over the parameters       stages.h     the second rung: single stages
 *   parallel.h   experts on several ranks         transport.h  what carries their messages, of your own
 *   cost.h       what a configuration costs       mpi.h        ranks as MPI processes; its own library, not here
 *
 * handle (one device) -> layer (immutable, shared) -> calls (everything else in one struct, stream last).
 * A first program: examples/forward.c. */
#ifndef CUMOE_H
#define CUMOE_H

#include <cumoe/cost.h>
#include <cumoe/handle.h>
#include <cumoe/layer.h>
#include <cumoe/optimizer.h>
#include <cumoe/parallel.h>
#include <cumoe/stages.h>
#include <cumoe/transport.h>

#endif
