#!/bin/sh
# Does the language model run, say no where it must, and give the same figures whatever the threads and the memory?
#
#   test.sh PROGRAM FOLDER            all but
#   test.sh PROGRAM FOLDER MPIEXEC    ranks as processes
set -eu
program=$(realpath "$1")
mpiexec=${3-}
folder=$(mktemp -d "$2/language-model-test.XXXXXX")
trap 'rm -rf "$folder"' EXIT
cd "$folder"

fail()
{
    echo "FAILED: $*" >&2
    exit 1
}

# Two texts of random words; no network needed.
words() # seed words
{
    awk -v seed="$1" -v list="$2" 'BEGIN {
        srand(seed); n = split(list, word, " ")
        for (i = 0; i < 16000; i++) printf "%s%s", word[1 + int(n * rand())], i % 11 == 10 ? ".\n" : " "
    }'
}
words 1 "and the unto him said saith begat heaven earth behold" >first.txt
words 2 "hacker kernel compile jargon bit segfault flame quux" >second.txt

# A run writes its tables and says so.
quick() # folder options...
{
    out=$1
    shift
    "$program" --text first.txt --text second.txt --quick --steps 6 --backend cpu --out "$out" "$@" >"$out.log" ||
        fail "a quick run: $(cat "$out.log")"
}

# Ranks as processes give the figures of as many threads; the others are silent. A process that fails ends the run.
processes() # number of processes, options...
{
    number=$1
    shift
    "$mpiexec" -n "$number" "$program" --text first.txt --ranks mpi --backend cpu --quick "$@"
}
perplexities()
{
    grep perplexity "$1/ranks.tsv"
}
if [ -n "$mpiexec" ]; then
    quick threads --ranks 3 --steps 20 --seeds 2
    processes 3 --text second.txt --out processes --steps 20 --seeds 2 >processes.log 2>&1 || fail "$(cat processes.log)"
    perplexities threads >expected
    [ "$(grep -c 'MoE-32, ranks, seed' expected)" = 2 ] || fail "no two trainings on ranks"
    perplexities processes | cmp - expected || fail "processes have other perplexities than threads"
    [ "$(grep -c '^Took' processes.log)" = 1 ] || fail "not one process alone speaks"
    grep -q '3 .* 11 |' processes/ranks.md || fail "ranks.md is not about 3 ranks"
    if processes 1 --out lost --steps 4 : -n 1 "$program" --text nowhere.txt --ranks mpi >lost.log 2>&1; then
        fail "a text is missing, and the run is good"
    fi
    grep -q 'cannot read the text nowhere.txt' lost.log || fail "the end of a process: $(cat lost.log)"
    exit
fi

quick one --threads 1
for file in demo.md demo.tsv perplexity.gp load.gp experts.gp; do
    [ -s "one/$file" ] || fail "$file is missing"
done
for name in dense MoE-4 MoE-32 MoE-256 "Balance" "What experts"; do
    grep -q "$name" one/demo.md || fail "demo.md does not mention $name"
done
grep -q nan one/demo.tsv && fail "a figure is not a number"

# Threads and separate device memory change no figure; rates and seconds are the machine's.
figures()
{
    grep -v 'per_second\|seconds' "$1/demo.tsv"
}
figures one >expected
quick more --threads 3
figures more | cmp - expected || fail "3 threads give other figures than 1"
quick copy --copy
figures copy | cmp - expected || fail "--copy gives other figures"

# Table 6: the six rows in the paper's order.
quick rows --table6
rows=$(sed -n 's/^| \([0-9.]* and [0-9.]*\) *|.*/\1/p' rows/table6.md | tr '\n' ,)
[ "$rows" = "0 and 0,0.2 and 0,0 and 0.2,0.1 and 0.1,0.01 and 0.01,1 and 1," ] || fail "the rows of table 6 are $rows"
grep -q 'too short to judge' rows/table6.md || fail "table 6 says nothing of its verdict"
grep -q 'nan\|inf' rows/table6.tsv && fail "a figure of table 6 is not a number"
[ ! -e rows/demo.md ] || fail "--table6 wrote demo.md"
# An interrupted run goes on: trainings that it has are taken over, and the tables are those of one run.
quick rows --table6 --resume
[ "$(grep -c 'seed 1.*perplexity' rows/table6.tsv)" = 6 ] || fail "a resumed run has not six trainings"
cp rows/table6.tsv whole.tsv
grep -n 'MoE-64, 0.2 and 0, seed 1.*cv_load' rows/table6.tsv | cut -d: -f1 | head -n 1 >cut
head -n "$(cat cut)" whole.tsv >rows/table6.tsv
printf 'training\tMoE-64, 0.2 a' >>rows/table6.tsv
quick rows --table6 --resume
without_times() { grep -v 'per_second\|seconds\|^verdict' "$1"; } # verdicts are made of more digits than the table has
without_times whole.tsv >expected.rows
without_times rows/table6.tsv | cmp - expected.rows || fail "a resumed run has other figures"
if "$program" --text first.txt --text second.txt --table6 --quick --steps 7 --resume --out rows >refused.log 2>&1; then fail "steps"; fi
grep -q 'in table6.tsv steps is 6, and now 7' refused.log || fail "another protocol: $(cat refused.log)"

# Strict balance: every expert takes its share, 1024 * 4 / 32 characters, of every batch.
quick strict --balanced
[ "$(grep -c '| 128 to 128 |' strict/balanced.md)" = 2 ] || fail "the strictly balanced load is not exact"
grep -q 'nan\|inf' strict/balanced.tsv && fail "a figure of --balanced is not a number"

# Ranks: the same model, whatever shares it; 3 do not divide the batch.
quick ranks --ranks 3
awk '/^\| /&&$4 ~ /^[0-9.]+$/ { n++; p[n] = $6 } END { d = p[1] - p[2]; exit !(n == 2 && d < 0.05 && d > -0.05) }' ranks/ranks.md ||
    fail "ranks give another perplexity: $(cat ranks/ranks.md)"
quick copied --ranks 2 --copy

# The optimizer of the layer and the schedules are the caller's choice, and named in the report.
quick lm --optimizer factored --schedule lm
grep -q 'factored for the experts' lm/demo.md || fail "demo.md does not name the optimizer"
grep -q 'rises over 1000 steps' lm/demo.md || fail "demo.md does not name the schedule"
quick translation --schedule translation
figures translation | cmp -s - expected && fail "the schedule changes nothing"

# What is wrong is said in one sentence, and nothing is written.
refused() # words of the sentence, then options
{
    sentence=$1
    shift
    if "$program" --out refused "$@" >refused.log 2>&1; then fail "accepted: $*"; fi
    grep -q -- "$sentence" refused.log || fail "$*: not the sentence expected, but: $(cat refused.log)"
    [ ! -e refused ] || fail "$*: a folder was made"
}
: >empty.txt
echo short >short.txt
refused "no text"
refused "only --table6" --text first.txt --resume
refused "must be a number" --text first.txt --batch 65537
refused "must be a number" --text first.txt --rate 0
refused "cannot read the text nowhere.txt" --text nowhere.txt
refused "cannot read the text ." --text .
refused "the text empty.txt is empty" --text empty.txt
refused "too short" --text short.txt
refused "must be a number" --text first.txt --seeds three
refused "must be a number" --text first.txt --steps 0
refused "must be a number" --text first.txt --epochs -1
refused "must be a whole number" --text first.txt --threads 1.5
refused "cpu, cuda or auto" --text first.txt --backend tpu
refused "must be a number" --text first.txt --ranks 1
refused "linear, lm or translation" --text first.txt --schedule cosine
refused "adam or factored" --text first.txt --optimizer sgd
refused "not an option" --text first.txt second.txt
refused "unrecognized option" --text first.txt --sed 3x --nonsense
"$program" --help | grep -q -- --seeds || fail "--help"
