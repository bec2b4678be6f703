/* In place of NCCL: ranks are threads of one process, on the simulated GPU. Its functions are looked for and called
 * by the library as NCCL's are; these are for tests, found by dlsym(). */
#ifndef CUMOE_TESTS_NCCL_STAND_IN_H
#define CUMOE_TESTS_NCCL_STAND_IN_H

/* The CALL-th call of the function NAME from now on fails; NULL = none. "asynchronous": what
 * ncclCommGetAsyncError() tells then is a failure of others. What is freed by the function is freed all the same.
 */
typedef void stand_in_fail_t(const char *name, int call);

/* Whether that call has come. */
typedef int stand_in_failed_t(void);

/* The text of these failures. */
#define STAND_IN_TEXT "the stand-in was told to fail"

/* Communicators that are alive. */
typedef int stand_in_live_t(void);

/* Calls that NCCL would not survive: with a communicator that is not alive, with another current device than its
 * own, of another group's ranks, before the call before is done. */
typedef int stand_in_misuse_t(void);

/* What ncclGetVersion() gives; at the start 22899. */
typedef void stand_in_version_t(int version);

/* ON: a communicator is ready at once, whoever else has come. */
typedef void stand_in_alone_t(int on);

/* How many messages and sums were for other streams than that of the last question; from now on, than STREAM. */
typedef int stand_in_elsewhere_t(void *stream);

/* A blocking communicator, for a rank of one. */
typedef void *stand_in_blocking_t(void);

#endif
