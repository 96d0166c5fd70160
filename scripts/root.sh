# shellcheck shell=bash
# Functions that make Debian roots with mmdebstrap and run commands in them. Source it after lib.sh.

# The archive that this host itself uses: no mirror's address stands in the project.
mirror() {
	local uri=${KDP_DEBIAN_MIRROR:-}
	if [ -z "$uri" ]; then
		uri=$(apt-get indextargets --format '$(REPO_URI)|$(LABEL)|$(COMPONENT)' 'Identifier: Packages' |
			awk -F'|' '$2 == "Debian" && $3 == "main" { print $1; exit }')
	fi
	[ -n "$uri" ] || die "apt on this machine names no Debian archive: set KDP_DEBIAN_MIRROR to one that has trixie."
	printf '%s\n' "$uri"
}

install_mmdebstrap() {
	apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends mmdebstrap debian-archive-keyring
}

# make_root DIR PACKAGES [OPTION...]: make a Debian trixie root at DIR with PACKAGES (separated by
# commas). DIR appears when the root is complete. OPTIONs are passed to mmdebstrap.
make_root() {
	local root=$1 packages=$2 uri opts=() line
	shift 2
	uri=$(mirror)
	# mmdebstrap does not read the host's proxy settings by itself.
	while read -r line; do opts+=(--aptopt="$line"); done < <(apt-config dump | grep -E '^Acquire::https?::Proxy ' || true)
	rm -rf "$root.part"
	mmdebstrap --variant=apt --include="$packages" "${opts[@]}" "$@" \
		--keyring=/usr/share/keyrings/debian-archive-keyring.gpg trixie "$root.part" \
		"deb $uri trixie main" "deb $uri trixie-updates main" "deb $uri trixie-backports main" || return
	mkdir -p "$root.part/kdp/src" "$root.part/kdp/cache" "$root.part/kdp/kdir" && mv "$root.part" "$root"
}

# in_root ROOT [SOURCE:DEST...] -- COMMAND...: run COMMAND in ROOT with each SOURCE mounted at DEST.
# The command has a mount namespace of its own, so nothing stays mounted when it ends. It starts in
# the folder KDP_ROOT_DIR.
in_root() {
	local root=$1 binds=()
	shift
	while [ "$1" != -- ]; do
		binds+=("$1")
		shift
	done
	shift
	KDP_ROOT=$root KDP_BINDS=$(printf '%s\n' "${binds[@]}") KDP_ROOT_DIR=${KDP_ROOT_DIR:-/} \
		unshare --mount --propagation private bash -c '
		set -e
		while IFS=: read -r from to; do
			[ -z "$from" ] || mount --bind "$from" "$KDP_ROOT$to"
		done <<<"$KDP_BINDS"
		mount -t proc proc "$KDP_ROOT/proc"
		mount --rbind /sys "$KDP_ROOT/sys"
		mount --rbind /dev "$KDP_ROOT/dev"
		mount -t tmpfs tmpfs "$KDP_ROOT/tmp"
		mount -t tmpfs tmpfs "$KDP_ROOT/run"
		# Names are resolved, and TLS is trusted, as on the host.
		for f in /etc/resolv.conf /etc/hosts /etc/ssl/certs/ca-certificates.crt; do
			[ -e "$f" ] || continue
			[ -e "$KDP_ROOT$f" ] || install -D -m 644 /dev/null "$KDP_ROOT$f"
			mount --bind "$(readlink -f "$f")" "$KDP_ROOT$f"
		done
		exec chroot "$KDP_ROOT" /usr/bin/env -i TERM="${TERM:-dumb}" LANG=C.UTF-8 HOME=/kdp/cache/home \
			PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin CARGO_HOME=/kdp/cache/cargo \
			CARGO_NET_GIT_FETCH_WITH_CLI=true ${http_proxy:+http_proxy="$http_proxy"} ${https_proxy:+https_proxy="$https_proxy"} \
			sh -c "cd $KDP_ROOT_DIR && exec \"\$@\"" sh "$@"
		' bash "$@"
}
