# shellcheck shell=bash
# What all scripts here share: where things are, how a step is run and told, how a failure is told.
#
# Source it; it defines functions and variables and does nothing else.

# The checkout, and everything that is derived from it.
KDP_SRC=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
KDP_BUILD=$KDP_SRC/build

# What outlives a checkout: the toolbox root, the kernel's source, kernels, cargo's registry. Each part has
# a stamp that is written last, so an interrupted step is taken up again and a whole one is never redone.
KDP_CACHE=${KDP_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kvm-demand-paging}
KDP_LOGS=$KDP_CACHE/log

# The kernel of the test VM (scripts/kernel lists the kinds).
export KDP_KERNEL=${KDP_KERNEL:-stock}

# Where the same folders are inside the toolbox and inside the test VM: no path of this machine reaches a
# build, so results are the same everywhere.
# shellcheck disable=SC2034  # used by whoever sources this
KDP_IN_SRC=/kdp/src
# shellcheck disable=SC2034
KDP_IN_CACHE=/kdp/cache

say() { printf '%s\n' "$*"; }
warn() { printf '%s\n' "$*" >&2; }
die() {
	warn "error: $*"
	exit 1
}

# elapsed SECONDS: as people read it.
elapsed() {
	if (($1 < 60)); then printf '%ds' "$1"; else printf '%dm%02ds' $(($1 / 60)) $(($1 % 60)); fi
}

# Whether a line of standard output can be overwritten. It cannot while two steps run at once.
is_terminal() { [ -t 1 ] && [ -z "${KDP_BESIDE:-}" ]; }

# beside COMMAND COMMAND: run two functions at once, each a series of steps. When one fails, end the
# other.
beside() {
	local rc=0 pids=()
	export KDP_BESIDE=yes
	# Each in a process group of its own, so that all of its processes can be ended.
	set -m
	"$1" &
	pids+=($!)
	"$2" &
	pids+=($!)
	set +m
	# shellcheck disable=SC2064  # the pids of now are meant
	trap "kill -- -${pids[0]} -${pids[1]} 2>/dev/null; exit 130" INT TERM
	wait -n || rc=$?
	((rc == 0)) || kill -- "-${pids[0]}" "-${pids[1]}" 2>/dev/null || true
	wait "${pids[0]}" || rc=$?
	wait "${pids[1]}" || rc=$?
	trap - INT TERM
	unset KDP_BESIDE
	return "$rc"
}

# step NAME TEXT COMMAND...: run COMMAND with its output in a log; show one line with the time that passed.
# A failure names the step, shows the end of the log and says where the log is.
step() {
	local name=$1 text=$2 log start now pid rc=0
	shift 2
	mkdir -p "$KDP_LOGS"
	log=$KDP_LOGS/$name.log
	start=$SECONDS
	# In a process group of its own: what COMMAND has started is ended with it.
	set -m
	"$@" >"$log" 2>&1 </dev/null &
	pid=$!
	set +m
	# shellcheck disable=SC2064  # the pid of now is meant
	trap "kill -- -$pid 2>/dev/null; exit 130" INT TERM
	is_terminal || say "[ .... ] $text"
	while kill -0 "$pid" 2>/dev/null; do
		now=$((SECONDS - start))
		if is_terminal; then
			printf '\r\033[K[ %4s ] %s' "$(elapsed $now)" "$text"
		elif ((now > 0 && now % 60 == 0)); then
			say "[ $(elapsed $now) ] $text: $(tail -n 1 "$log" | tr -d '\r' | cut -c 1-100)"
		fi
		sleep 1
	done
	wait "$pid" || rc=$?
	trap - INT TERM
	now=$(elapsed $((SECONDS - start)))
	if ((rc == 0)); then
		is_terminal && printf '\r\033[K'
		say "[ done ] $text ($now)"
		return 0
	fi
	is_terminal && printf '\r\033[K'
	say "[ FAIL ] $text ($now)"
	warn "The step '$name' failed with status $rc. The end of its log:"
	tail -n 25 "$log" | sed 's/^/    /' >&2
	warn "The whole log: $log"
	return "$rc"
}

# name_matches NAME PATTERN...: whether the name of a test matches one of the patterns. A pattern is
# a shell glob, or the beginning of a name.
name_matches() {
	local name=$1 pattern
	shift
	for pattern; do
		# shellcheck disable=SC2053  # the right side is a glob
		[[ $name != $pattern && $name != "$pattern"* ]] || return 0
	done
	return 1
}

# hash_of FILE-OR-STRING...: a short name for the contents that a cached thing was made from.
hash_of() {
	local x
	for x in "$@"; do
		if [ -f "$x" ]; then cat "$x"; else printf '%s\n' "$x"; fi
	done | sha256sum | cut -c 1-12
}
