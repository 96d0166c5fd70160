#!/usr/bin/env bash
# Tests the installed packages on Debian's kernel: inside the test VM, with the module that DKMS
# built. Prints TAP. The last line is `N passed, N failed`.
#
#   packages.sh FILES [PATTERN...]   FILES is a folder with the files that the packages installed
# shellcheck disable=SC2317  # functions are called by name
set -uo pipefail
# shellcheck source=scripts/lib.sh
. scripts/lib.sh
# shellcheck source=scripts/tap.sh
. scripts/tap.sh

files=$1
shift
patterns=("${@:-*}")

doctor() { "$files/usr/bin/kdp" doctor; }
guest_is_paged() { "$files/usr/bin/kdp-vmm" run --mode exit --backing hugetlb-2M --memory 16M; }

# Each service of the packages starts, and no VM is lost when the keeper or the page handler is
# restarted or killed. systemd runs in namespaces of its own, on the VM's root and the installed
# files.
units() {
	work=/run/units
	root=$work/root
	mkdir -p $work/{files,upper,work} $root
	cp -a "$files/." $work/files
	modprobe -q overlay || true
	mount -t overlay -o lowerdir=$work/files:/,upperdir=$work/upper,workdir=$work/work \
		overlay $root
	mount --rbind /dev $root/dev
	mount --rbind /sys $root/sys
	mount -t tmpfs -o mode=755 run $root/run
	mount -t tmpfs tmp $root/tmp
	systemd-sysusers --root=$root kvm-demand-paging.conf

	# The guest's memory: each page holds its number.
	image=$root/srv/image
	for ((page = 0; page < 4096; page++)); do printf '%-4095d\n' $page; done >$image
	cp $root/etc/kdp/handle/example.env $root/etc/kdp/handle/web1.env
	cat >>$root/etc/kdp/handle/web1.env <<-EOF
		KDP_SOURCE=file:/srv/image
		KDP_VM="--create web1 --size 16M --shmem"
		KDP_KEEPER=unix:/run/kdp/keeper.sock
	EOF

	# Mask the units that this test does not need.
	for unit in systemd-journald.service systemd-udevd.service systemd-udev-trigger.service \
		systemd-logind.service systemd-networkd.service getty.target; do
		ln -sf /dev/null "$root/etc/systemd/system/$unit"
	done
	printf '[Manager]\nDefaultStandardOutput=kmsg\nLogTarget=kmsg\n' >$root/etc/systemd/system.conf

	unshare --pid --fork --kill-child --mount --mount-proc=$root/proc --ipc --cgroup chroot $root \
		/usr/bin/env -i container=kdp PATH=/usr/sbin:/usr/bin /usr/lib/systemd/systemd --unit=basic.target \
		>/dev/kmsg 2>&1 </dev/null &
	systemd=
	inside() { nsenter --target "$systemd" --mount --pid --cgroup --root --wdns=/ "$@"; }
	ctl() { inside systemctl "$@"; }
	# until_true WHAT COMMAND...: wait until COMMAND succeeds.
	until_true() {
		local what=$1 end=$((SECONDS + 300))
		shift
		while ((SECONDS < end)); do
			if "$@" >/dev/null 2>&1; then return; fi
			sleep 0.1
		done
		dmesg | tail -n 40
		ctl status --no-pager kdp-keeper.service kdp-handle@web1.service || true
		fail "waited 300 s: $what"
	}
	found() { systemd=$(pgrep -P $! -x systemd); }
	until_true "systemd is there" found
	until_true "systemd is up" ctl is-active basic.target

	pid_of() { ctl show -p MainPID --value "$1"; }
	keeper=kdp-keeper.service handle=kdp-handle@web1.service
	kept() { inside kdp kept --at unix:/run/kdp/keeper.sock; }
	has_web1() { kept | grep -qx web1; }
	# another_runs UNIT PID: whether UNIT runs as another process.
	another_runs() { [ "$(ctl is-active "$1")" = active ] && [ "$(pid_of "$1")" != "$2" ]; }
	# reads PAGE: the VM has the right content at PAGE, which the page handler fetches.
	reads() {
		local said
		said=$(inside timeout 60 python3 -c "import mmap; vm = open('/dev/kdp/web1', 'r+b')
print(int(mmap.mmap(vm.fileno(), 4096, offset=$1 * 4096)[:4095]))")
		equal "page $1 of the VM" "$said" "$1"
	}

	ctl start kdp-keeper.socket $keeper
	equal "the keeper" "$(ctl is-active $keeper)" active
	equal "mode and group of its socket" "$(inside stat -c '%a %G' /run/kdp/keeper.sock)" "660 kdp"
	ctl start $handle
	equal "the page handler" "$(ctl is-active $handle)" active
	until_true "the keeper has the VM" has_web1
	reads 1

	say "# restart the keeper"
	was=$(pid_of $keeper)
	ctl restart $keeper
	until_true "another keeper runs" another_runs $keeper "$was"
	until_true "the restarted keeper has the VM" has_web1

	say "# kill the keeper"
	was=$(pid_of $keeper)
	ctl kill --signal=KILL $keeper
	until_true "another keeper runs" another_runs $keeper "$was"
	until_true "the next keeper has the VM" has_web1
	reads 2

	# More often than systemd allows by default.
	for page in 3 4 5 6 7 8; do
		say "# kill the page handler"
		was=$(pid_of $handle)
		ctl kill --signal=KILL $handle
		until_true "another page handler runs" another_runs $handle "$was"
		reads $page
	done

	say "# stop the page handler; the keeper has the VM until it is released"
	ctl stop $handle
	reads 1
	has_web1 || fail "the keeper released the VM"
	inside kdp kept --at unix:/run/kdp/keeper.sock --release web1
	until_true "the VM is gone" inside test ! -e /dev/kdp/web1

	say "# a page handler without a source is not started again"
	: >$root/etc/kdp/handle/web2.env
	if ctl start kdp-handle@web2.service 2>/dev/null; then fail "it was started"; fi
	equal "the result" "$(ctl show -p Result --value kdp-handle@web2.service)" exit-code
	equal "the state" "$(ctl show -p SubState --value kdp-handle@web2.service)" failed
	equal "its restarts" "$(ctl show -p NRestarts --value kdp-handle@web2.service)" 0

	say "# a page handler without settings is not started"
	if ctl start kdp-handle@web3.service 2>/dev/null; then fail "it was started"; fi
	equal "the state" "$(ctl show -p ActiveState --value kdp-handle@web3.service)" inactive
}

insmod "$KDP_MODULE" || exit 1
t pkg-the-doctor-passes-on-debians-kernel doctor
t pkg-a-guest-is-paged-on-debians-kernel guest_is_paged
t pkg-the-units-keep-a-vm-through-restarts units
summary
