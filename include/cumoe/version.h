/* The version of the headers, the only place where it stands. Semantic versioning: until 1.0 a minor
 * version may change the interface. */
#ifndef CUMOE_VERSION_H
#define CUMOE_VERSION_H

#define CUMOE_VERSION_MAJOR 0
#define CUMOE_VERSION_MINOR 1
#define CUMOE_VERSION_PATCH 0
#define CUMOE_VERSION       (CUMOE_VERSION_MAJOR * 10000 + CUMOE_VERSION_MINOR * 100 + CUMOE_VERSION_PATCH)

#endif
