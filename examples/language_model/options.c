#include "options.h"

#include "device.h"
#include "protocol.h"
#include "ranks.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char help[] =
    "Usage: cumoe-language-model --text PATH [--text PATH ...] [options]\n"
    "\n"
    "Trains character language models that differ in one layer: dense, and mixtures of 4, 32 and 256 experts with "
    "the\n"
    "same operations per character. Prints tables, and writes them with pictures into a folder.\n"
    "With --table6: a mixture of 64 experts with six pairs of weights of its balancing losses (paper, table "
    "6).\n"
    "With --balanced: mixtures of 32 experts, strictly balanced (paper, appendix F) and noisy top-k.\n"
    "\n"
    "  --text PATH      a text to learn; may be repeated, up to 8 times. Two texts show which experts each one "
    "uses\n"
    "  --table6         the paper's table 6, in place of all other tables; about an hour of a core\n"
    "  --balanced       the strictly balanced gate, in place of all other tables; about 2 minutes\n"
    "  --ranks N        MoE-32 on one rank and on N, each with its part of the batch and its experts; about 2 "
    "minutes\n"
    "  --ranks mpi      the same, where the ranks are the processes of mpirun -n N cumoe-language-model --ranks "
    "mpi\n"
    "  --seeds N        train the models of the first table N times, from other random numbers    [1; table 6: "
    "3]\n"
    "  --epochs X       passes over the training characters                                       [1; table 6: 3]\n"
    "  --steps N        steps, instead of --epochs\n"
    "  --batch N        characters in a step                                                      [1024; table 6: "
    "4096]\n"
    "  --rate X         the highest learning rate                                                 [0.01; table 6: "
    "0.003]\n"
    "  --schedule NAME  linear: the learning rate falls to 0 in a straight line; lm, translation: the paper's "
    "[linear]\n"
    "  --optimizer NAME adam, or factored: the experts' second moments as row and column means         [adam]\n"
    "  --quick          a few steps and no verdict: does everything run?\n"
    "  --resume         with --table6: go on where a run into the same folder was interrupted\n"
    "  --threads N      threads; under mpirun of each process                                     [all "
    "processors;\n"
    "                                                                                             under mpirun "
    "a share]\n"
    "  --out DIR        folder for demo.md (table6.md, balanced.md, ranks.md), demo.tsv and the pictures; made if "
    "it is "
    "missing       "
    "[language-model]\n"
    "  --backend NAME   cpu, cuda, or auto: cuda if there is a device                             [auto]\n"
    "  --copy           keep host and device memory apart on the CPU as well; the same figures, slower\n"
    "  --help           this text\n"
    "\n"
    "Exit status: 0 all went well and MoE-32 beats the dense layer by more than the spread (table 6: the losses "
    "balance\nthe load); 1 an error; 2 it does not.\n";

static double number(const char *name, const char *text, double least, double most)
{
    char *end;
    errno = 0;
    double value = strtod(text, &end);
    if (end == text || *end || errno || !(value >= least && value <= most))
        die("%s %s: must be a number from %g to %g (see --help)", name, text, least, most);
    return value;
}

static int integer(const char *name, const char *text, int least, int most)
{
    double value = number(name, text, least, most);
    if (value != floor(value)) die("%s %s: must be a whole number (see --help)", name, text);
    return (int)value;
}

static cumoe_backend_t backend(const char *name)
{
    static const struct {
        const char *name;
        cumoe_backend_t backend;
    } backends[] = {{"auto", CUMOE_BACKEND_AUTO}, {"cpu", CUMOE_BACKEND_CPU}, {"cuda", CUMOE_BACKEND_CUDA}};
    for (size_t i = 0; i < sizeof backends / sizeof *backends; i++)
        if (strcmp(name, backends[i].name) == 0) return backends[i].backend;
    die("--backend %s: must be cpu, cuda or auto", name);
}

static schedule_kind_t schedule(const char *name)
{
    for (schedule_kind_t kind = 0; kind < NUM_SCHEDULES; kind++)
        if (strcmp(name, schedule_name(kind)) == 0) return kind;
    die("--schedule %s: must be linear, lm or translation", name);
}

static cumoe_optimizer_t optimizer(const char *name)
{
    if (strcmp(name, "adam") == 0) return CUMOE_OPTIMIZER_ADAM;
    if (strcmp(name, "factored") == 0) return CUMOE_OPTIMIZER_FACTORED_ADAM;
    die("--optimizer %s: must be adam or factored", name);
}

void options_read(options_t *options, int argc, char **argv)
{
    enum {
        TEXT = 1,
        TABLE6,
        BALANCED,
        RANKS,
        SEEDS,
        EPOCHS,
        STEPS,
        BATCH_SIZE,
        RATE,
        SCHEDULE,
        OPTIMIZER,
        QUICK,
        RESUME,
        THREADS,
        OUT,
        BACKEND,
        COPY,
        HELP
    };
    static const struct option names[] = {{"text", required_argument, NULL, TEXT},
                                          {"table6", no_argument, NULL, TABLE6},
                                          {"balanced", no_argument, NULL, BALANCED},
                                          {"ranks", required_argument, NULL, RANKS},
                                          {"seeds", required_argument, NULL, SEEDS},
                                          {"epochs", required_argument, NULL, EPOCHS},
                                          {"steps", required_argument, NULL, STEPS},
                                          {"batch", required_argument, NULL, BATCH_SIZE},
                                          {"rate", required_argument, NULL, RATE},
                                          {"schedule", required_argument, NULL, SCHEDULE},
                                          {"optimizer", required_argument, NULL, OPTIMIZER},
                                          {"quick", no_argument, NULL, QUICK},
                                          {"resume", no_argument, NULL, RESUME},
                                          {"threads", required_argument, NULL, THREADS},
                                          {"out", required_argument, NULL, OUT},
                                          {"backend", required_argument, NULL, BACKEND},
                                          {"copy", no_argument, NULL, COPY},
                                          {"help", no_argument, NULL, HELP},
                                          {0}};
    *options = (options_t){.out = "language-model"};
    for (int option; (option = getopt_long(argc, argv, "", names, NULL)) != -1;) switch (option) {
        case TEXT:
            if (options->num_texts == MAX_TEXTS) die("--text: more than %d texts", MAX_TEXTS);
            options->text[options->num_texts++] = optarg;
            break;
        case TABLE6:
            options->experiment = EXPERIMENT_TABLE6;
            break;
        case BALANCED:
            options->experiment = EXPERIMENT_BALANCED;
            break;
        case RANKS:
            options->experiment = EXPERIMENT_RANKS;
            options->processes = strcmp(optarg, "mpi") == 0;
            if (!options->processes) options->ranks = integer("--ranks", optarg, 2, MAX_RANKS);
            break;
        case SEEDS:
            options->seeds = integer("--seeds", optarg, 1, 100);
            break;
        case EPOCHS:
            options->epochs = number("--epochs", optarg, 1e-6, 1e6);
            break;
        case STEPS:
            options->steps = integer("--steps", optarg, 1, 1000000000);
            break;
        case BATCH_SIZE:
            options->batch = integer("--batch", optarg, 1, MAX_BATCH);
            break;
        case RATE:
            options->rate = number("--rate", optarg, 1e-9, 1);
            break;
        case SCHEDULE:
            options->schedule = schedule(optarg);
            break;
        case OPTIMIZER:
            options->optimizer = optimizer(optarg);
            break;
        case QUICK:
            options->quick = true;
            break;
        case RESUME:
            options->resume = true;
            break;
        case THREADS:
            options->threads = integer("--threads", optarg, 1, 4096);
            break;
        case OUT:
            options->out = optarg;
            break;
        case BACKEND:
            options->backend = backend(optarg);
            break;
        case COPY:
            options->copy = true;
            break;
        case HELP:
            fputs(help, stdout);
            exit(EXIT_SUCCESS);
        default:
            exit(EXIT_FAILURE);
        }
    if (options->experiment != EXPERIMENT_RANKS) options->processes = false;
    if (options->resume && options->experiment != EXPERIMENT_TABLE6)
        die("--resume: only --table6 takes so long; see --help");
    const bool long_run = options->experiment == EXPERIMENT_TABLE6 && !options->quick;
    if (!options->seeds) options->seeds = long_run ? TABLE6_SEEDS : 1;
    if (!options->batch) options->batch = long_run ? TABLE6_BATCH : BATCH;
    if (options->rate == 0) options->rate = long_run ? TABLE6_RATE : LEARNING_RATE;
    if (options->epochs == 0) options->epochs = long_run ? TABLE6_EPOCHS : 1;
    if (optind < argc) die("%s: not an option; a text is named by --text (see --help)", argv[optind]);
    if (options->num_texts == 0) die("no text; name one by --text PATH, or let fetch_text.sh get two (see --help)");
}
