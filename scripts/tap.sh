# shellcheck shell=bash
# Functions for tests in bash that print TAP. Source it after lib.sh, set `patterns`, call `t` for
# each test, and call `summary` at the end.

passed=0 failed=0 tests=0 patterns=('*')

# t NAME COMMAND...: run a test if its name matches. It passes if COMMAND succeeds.
t() {
	local name=$1 out rc
	shift
	name_matches "$name" "${patterns[@]}" || return 0
	tests=$((tests + 1))
	out=$(
		set -e
		"$@" 2>&1
	)
	rc=$?
	if ((rc == 0)); then
		passed=$((passed + 1))
		say "ok $tests $name"
	else
		failed=$((failed + 1))
		say "not ok $tests $name"
		printf '%s\n' "$out" | tail -n 40 | sed 's/^/# /'
	fi
}

# fail TEXT: end the running test as failed.
fail() {
	say "$*"
	exit 1
}

# equal WHAT HAVE WANT: fail unless HAVE is WANT.
equal() { [ "$2" = "$3" ] || fail "$1: '$2', expected '$3'"; }
# has TEXT PART: fail unless TEXT contains PART.
has() { case $1 in *"$2"*) ;; *) fail "expected '$2' in: $1" ;; esac; }

summary() {
	say "$passed passed, $failed failed"
	((failed == 0 && tests > 0))
}
