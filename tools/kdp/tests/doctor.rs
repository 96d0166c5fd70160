//! `kdp doctor` on hosts that are directories.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use serde_json::Value;
use std::{
    fs::{self, Permissions},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::{Command, Output},
};

const KDP: &str = env!("CARGO_BIN_EXE_kdp");
const VERSION: &str = env!("CARGO_PKG_VERSION");
const RELEASE: &str = "7.3.4+deb13-amd64";
/// A user without rights, and its group.
const NOBODY: u32 = 65534;

/// The root directory of a host.
struct Host(tempfile::TempDir);

impl Host {
    /// A host on which all checks pass, except that a file stands for each device.
    fn good() -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        host.chmod("", 0o755);
        for (path, text) in [
            ("proc/sys/kernel/osrelease", format!("{RELEASE}\n").as_str()),
            (
                "proc/self/status",
                "Name:\tkdp\nUid:\t0\t1000\t0\t0\nCapEff:\t0000000000000000\n",
            ),
            (
                "proc/self/limits",
                "Limit                     Soft Limit           Hard Limit           Units     \n\
                 Max open files            4096                 1048576              files     \n\
                 Max locked memory         unlimited            unlimited            bytes     \n",
            ),
            (
                "proc/meminfo",
                "MemTotal: 1 kB\nHardwareCorrupted:     0 kB\n",
            ),
            ("proc/sys/vm/unprivileged_userfaultfd", "0\n"),
            ("dev/userfaultfd", ""),
            ("dev/kvm", ""),
            ("dev/kvm-demand-paging", ""),
            (
                "etc/passwd",
                "root:x:0:0::/root:/bin/sh\nalice:x:1000:1000::/:/bin/sh\n",
            ),
            ("etc/group", "root:x:0:\nkdp:x:65534:\n"),
            (
                &format!("boot/config-{RELEASE}"),
                "CONFIG_64BIT=y\nCONFIG_RUST=y\n",
            ),
            (
                &format!("lib/modules/{RELEASE}/modules.dep"),
                "kernel/fs/fuse.ko.xz:\nupdates/dkms/kvm_demand_paging.ko: kernel/virt/kvm.ko.xz\n",
            ),
            (
                "sys/module/kvm_demand_paging/version",
                &format!("{VERSION}\n"),
            ),
            ("sys/module/kvm_amd/parameters/npt", "Y\n"),
            ("sys/module/module/parameters/sig_enforce", "N\n"),
            (
                "sys/kernel/security/lockdown",
                "[none] integrity confidentiality\n",
            ),
            ("sys/kernel/tracing/events/kvm/kvm_page_fault/id", "1\n"),
            ("sys/kernel/tracing/events/kvm/kvm_userspace_exit/id", "2\n"),
            (
                "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
                "512\n",
            ),
            (
                "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages",
                "500\n",
            ),
            (
                "sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages",
                "2\n",
            ),
            (
                "sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages",
                "1\n",
            ),
            (
                "sys/kernel/mm/transparent_hugepage/shmem_enabled",
                "always [within_size] advise never deny force\n",
            ),
        ] {
            host.write(path, text);
        }
        host.install(VERSION);
        host
    }

    fn root(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, path: &str, text: impl AsRef<[u8]>) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn remove(&self, path: &str) {
        let path = self.root().join(path);
        if path.is_dir() {
            fs::remove_dir_all(path).unwrap();
        } else {
            fs::remove_file(path).unwrap();
        }
    }

    fn chmod(&self, path: &str, mode: u32) {
        fs::set_permissions(self.root().join(path), Permissions::from_mode(mode)).unwrap();
    }

    /// A module file of this version, as `modinfo` reads it: an ELF file with a section .modinfo.
    fn install(&self, version: &str) {
        let modinfo = format!("license=GPL\0version={version}\0");
        let names = "\0.modinfo\0.shstrtab\0";
        let modinfo_at = 64;
        let names_at = modinfo_at + modinfo.len();
        let sections_at = (names_at + names.len()).next_multiple_of(8);
        let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
        elf.resize(16, 0);
        // A relocatable file for x86-64 with three section headers; the last one has their names.
        elf.extend([1u16, 62].map(u16::to_le_bytes).concat());
        elf.extend(1u32.to_le_bytes());
        elf.extend([0, 0, sections_at as u64].map(u64::to_le_bytes).concat());
        elf.extend(0u32.to_le_bytes());
        elf.extend([64u16, 0, 0, 64, 3, 2].map(u16::to_le_bytes).concat());
        elf.extend(modinfo.bytes().chain(names.bytes()));
        elf.resize(sections_at + 64, 0);
        for (name, kind, at, len) in [
            (1u32, 1u32, modinfo_at, modinfo.len()),
            (10, 3, names_at, names.len()),
        ] {
            elf.extend([name, kind].map(u32::to_le_bytes).concat());
            // Flags, address, offset, size, link and info, alignment, entry size.
            let fields = [0, 0, at as u64, len as u64, 0, 1, 0];
            elf.extend(fields.map(u64::to_le_bytes).concat());
        }
        self.write(
            &format!("lib/modules/{RELEASE}/updates/dkms/kvm_demand_paging.ko"),
            elf,
        );
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(KDP);
        command
            .arg("doctor")
            .arg("--root")
            .arg(self.root())
            .args(args);
        command
    }

    fn report(&self) -> Report {
        Report::of(self.command(&["--json"]).output().unwrap())
    }
}

struct Report {
    checks: Vec<Value>,
}

impl Report {
    fn of(output: Output) -> Self {
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        let checks = json["checks"].as_array().unwrap().clone();
        let works = checks.iter().all(|check| check["status"] != "error");
        assert_eq!(json["works"], works);
        assert_eq!(output.status.code(), Some(if works { 0 } else { 1 }));
        assert!(output.stderr.is_empty());
        Self { checks }
    }

    #[track_caller]
    fn expect(&self, name: &str, status: &str, found: &str) {
        let check = self
            .checks
            .iter()
            .find(|check| check["name"] == name)
            .unwrap();
        assert_eq!(
            (&check["status"], &check["found"]),
            (&status.into(), &found.into())
        );
        assert_eq!(check["advice"].is_null(), status == "ok", "{check}");
    }
}

#[test]
fn doctor_reads_a_host() {
    let host = Host::good();
    let report = host.report();
    for (name, found) in [
        ("kernel", RELEASE),
        (
            "config-rust",
            "CONFIG_RUST=y in /boot/config-7.3.4+deb13-amd64",
        ),
        (
            "module-file",
            "version 0.9.0, /lib/modules/7.3.4+deb13-amd64/updates/dkms/kvm_demand_paging.ko",
        ),
        ("module", "version 0.9.0 is loaded"),
        (
            "signatures",
            "the kernel also loads modules without a signature",
        ),
        (
            "kvm-tracepoints",
            "tracefs has the tracepoints: missing pages cause vCPU exits",
        ),
        ("two-dimensional-paging", "kvm_amd uses NPT"),
        ("huge-pages-2m", "500 of 512 free"),
        ("huge-pages-1g", "1 of 2 free"),
        ("shmem-huge-pages", "shmem_enabled is within_size"),
        ("rlimit-nofile", "4096 descriptors"),
        ("hwpoison", "the kernel handles memory errors"),
        (
            "userfaultfd",
            "unprivileged users get faults from user mode only; /dev/userfaultfd exists; \
             only kdp-bench uses it, for comparison",
        ),
    ] {
        report.expect(name, "ok", found);
    }
    // A file stands for each device. It does not support ioctls.
    report.expect("kvm", "error", "/dev/kvm reports API version -1, not 12");
    let abi = "KDP_INFO(): Inappropriate ioctl for device (os error 25): \
               this file descriptor is not a VM's";
    report.expect("abi", "error", abi);
}

#[test]
fn doctor_prints_a_table_of_100_columns() {
    let host = Host::good();
    host.remove("dev/kvm");
    let output = host.command(&[]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.starts_with("ok       kernel                  7.3.4+deb13-amd64\n"),
        "{text}"
    );
    let kvm = "\
error    kvm                     /dev/kvm does not exist
         do: modprobe kvm_amd (AMD) or kvm_intel (Intel); if that fails, enable SVM or VT-x in the
             firmware
";
    assert!(text.contains(kvm), "{text}");
    assert!(
        text.ends_with("demand paging does not work here (errors: 2, warnings: 0)\n"),
        "{text}"
    );
    assert!(
        text.lines().all(|line| line.chars().count() <= 100),
        "{text}"
    );
}

#[test]
fn doctor_finds_mode_bits() {
    let host = Host::good();
    for device in ["dev/kvm", "dev/kvm-demand-paging"] {
        host.chmod(device, 0o600);
    }
    let mut command = host.command(&["--json"]);
    let is_root = rustix::process::geteuid().is_root();
    if is_root {
        command.uid(NOBODY).gid(NOBODY);
    } else {
        host.chmod("dev/kvm", 0);
        host.chmod("dev/kvm-demand-paging", 0);
    }
    let report = Report::of(command.output().unwrap());
    report.expect(
        "kvm",
        "error",
        "alice may not open /dev/kvm for reading and writing",
    );
    if is_root {
        let found = "/dev/kvm-demand-paging is 0600 root:root; \
                     alice may not open it for reading and writing";
        report.expect("device", "error", found);
        report.expect("abi", "warning", "unknown: the device cannot be opened");
        let found = "tracefs has the tracepoints: missing pages cause vCPU exits";
        report.expect("kvm-tracepoints", "ok", found);
    }
}

#[test]
fn doctor_finds_an_old_kernel() {
    let host = Host::good();
    host.write("proc/sys/kernel/osrelease", "6.12.48+deb13-amd64\n");
    let report = host.report();
    let found = "6.12.48+deb13-amd64; the module needs 7.2 or later";
    report.expect("kernel", "error", found);
    // The files that are named by the release belong to another kernel.
    report.expect("config-rust", "ok", "not checked: the module is loaded");
    let found = "not installed for 6.12.48+deb13-amd64: \
                 the module is loaded now, but not after a reboot";
    report.expect("module-file", "warning", found);
}

#[test]
fn doctor_finds_a_kernel_without_rust_wherever_its_configuration_is() {
    let host = Host::good();
    host.remove("sys/module/kvm_demand_paging");
    host.remove(&format!("boot/config-{RELEASE}"));
    let expect = |status, found: &str| host.report().expect("config-rust", status, found);
    expect(
        "warning",
        "unknown: the configuration of the kernel was not found",
    );

    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut gz, b"CONFIG_RUST=y\n").unwrap();
    host.write("proc/config.gz", gz.finish().unwrap());
    expect("ok", "CONFIG_RUST=y in /proc/config.gz");
    for path in ["build/.config", "config"] {
        let path = format!("lib/modules/{RELEASE}/{path}");
        host.write(&path, "# CONFIG_RUST is not set\n");
        expect("error", &format!("CONFIG_RUST is not set in /{path}"));
        host.write(&path, "CONFIG_RUST=y\n");
        expect("ok", &format!("CONFIG_RUST=y in /{path}"));
    }
    host.write(
        &format!("boot/config-{RELEASE}"),
        "CONFIG_RUST_IS_AVAILABLE=y\n",
    );
    expect(
        "error",
        &format!("CONFIG_RUST is not set in /boot/config-{RELEASE}"),
    );
}

#[test]
fn doctor_finds_modules_of_another_version_or_none() {
    let host = Host::good();
    host.install("0.8.0");
    host.write("sys/module/kvm_demand_paging/version", "0.8.0\n");
    let report = host.report();
    let path = format!("/lib/modules/{RELEASE}/updates/dkms/kvm_demand_paging.ko");
    let found = format!("version 0.8.0, but kdp is 0.9.0: {path}");
    report.expect("module-file", "warning", &found);
    report.expect(
        "module",
        "warning",
        "version 0.8.0 is loaded, but kdp is 0.9.0",
    );

    host.remove("sys/module/kvm_demand_paging/version");
    host.write(path.trim_start_matches('/'), "not ELF");
    let report = host.report();
    let found = format!("the version is unknown: modinfo shows none for {path}");
    report.expect("module-file", "warning", &found);
    report.expect("module", "warning", "loaded, but its version is unknown");

    host.remove("sys/module/kvm_demand_paging");
    host.remove("dev/kvm-demand-paging");
    let report = host.report();
    report.expect("module", "error", "not loaded");
    let found = "/dev/kvm-demand-paging does not exist: the module is not loaded";
    report.expect("device", "error", found);

    host.remove(&format!("lib/modules/{RELEASE}/modules.dep"));
    let found = format!("not installed for {RELEASE}");
    host.report().expect("module-file", "error", &found);
}

#[test]
fn doctor_finds_what_kvm_lacks() {
    let host = Host::good();
    host.write("sys/module/kvm_amd/parameters/npt", "N\n");
    host.remove("sys/kernel/tracing/events/kvm/kvm_userspace_exit");
    let report = host.report();
    let waits = "a vCPU waits for a missing page and never exits";
    let found = format!("kvm_amd has npt=0: {waits}");
    report.expect("two-dimensional-paging", "warning", &found);
    report.expect(
        "kvm-tracepoints",
        "warning",
        &format!("tracefs lacks the tracepoints: {waits}"),
    );

    host.remove("sys/module/kvm_amd");
    host.write("sys/module/kvm_intel/parameters/ept", "Y\n");
    host.remove("sys/kernel/tracing");
    let report = host.report();
    report.expect("two-dimensional-paging", "ok", "kvm_intel uses EPT");
    let found = "unknown: the module cannot be asked, and tracefs cannot be read";
    report.expect("kvm-tracepoints", "warning", found);

    host.write(
        "sys/kernel/debug/tracing/events/kvm/kvm_page_fault/id",
        "1\n",
    );
    host.write(
        "sys/kernel/debug/tracing/events/kvm/kvm_userspace_exit/id",
        "1\n",
    );
    let found = "tracefs has the tracepoints: missing pages cause vCPU exits";
    host.report().expect("kvm-tracepoints", "ok", found);

    host.remove("sys/module/kvm_intel");
    host.remove("dev/kvm");
    let report = host.report();
    report.expect("kvm", "error", "/dev/kvm does not exist");
    let found = "unknown: neither kvm_amd nor kvm_intel is loaded";
    report.expect("two-dimensional-paging", "warning", found);
}

#[test]
fn doctor_finds_what_memory_lacks() {
    let host = Host::good();
    host.write(
        "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
        "0\n",
    );
    host.remove("sys/kernel/mm/hugepages/hugepages-1048576kB");
    host.write(
        "sys/kernel/mm/transparent_hugepage/shmem_enabled",
        "always within_size advise [never] deny force\n",
    );
    let limits = "Max open files            512   512   files\n\
                  Max locked memory         8388608 8388608 bytes\n";
    host.write("proc/self/limits", limits);
    host.write("proc/meminfo", "MemTotal: 1 kB\n");
    host.remove("proc/sys/vm/unprivileged_userfaultfd");
    let report = host.report();
    for (name, found) in [
        (
            "huge-pages-2m",
            "none: memslots of --hugetlb 2M cannot be created",
        ),
        (
            "huge-pages-1g",
            "this kernel or processor has no huge pages of 1G",
        ),
        (
            "shmem-huge-pages",
            "shmem_enabled is never: memslots of --shmem have pages of 4 KiB only",
        ),
        (
            "rlimit-nofile",
            "512 descriptors: many VMs or memslots need more",
        ),
        (
            "hwpoison",
            "the kernel does not handle memory errors: a memory error ends the host or its VMM",
        ),
        (
            "userfaultfd",
            "this kernel has no userfaultfd; only kdp-bench uses it, for comparison",
        ),
    ] {
        report.expect(name, "warning", found);
    }
}

#[test]
fn doctor_finds_that_signatures_are_required() {
    let host = Host::good();
    host.write(
        "sys/kernel/security/lockdown",
        "none [integrity] confidentiality\n",
    );
    let enforced = "the kernel loads signed modules only: lockdown is integrity";
    let found = format!("{enforced}; this module is loaded");
    host.report().expect("signatures", "ok", &found);
    host.remove("sys/module/kvm_demand_paging");
    host.report().expect("signatures", "warning", enforced);
    host.remove("sys/kernel/security/lockdown");
    host.write("sys/module/module/parameters/sig_enforce", "Y\n");
    let found = "the kernel loads signed modules only: sig_enforce is on";
    host.report().expect("signatures", "warning", found);
}

#[test]
fn doctor_survives_an_empty_host() {
    let host = Host(tempfile::tempdir().unwrap());
    let report = host.report();
    assert!(report.checks.iter().all(|check| check["found"].is_string()));
    let found = "the release is unknown: /proc/sys/kernel/osrelease cannot be read";
    report.expect("kernel", "warning", found);
    report.expect(
        "signatures",
        "ok",
        "the kernel also loads modules without a signature",
    );
}

#[test]
fn doctor_works_on_this_host_if_the_module_does() {
    let output = Command::new(KDP)
        .args(["doctor", "--json"])
        .output()
        .unwrap();
    let report = Report::of(output);
    if Path::new("/dev/kvm-demand-paging").exists() {
        report.expect("abi", "ok", "version 1");
    } else {
        let device = report
            .checks
            .iter()
            .find(|check| check["name"] == "device")
            .unwrap();
        assert_eq!(device["status"], "error");
    }
    let wrong = Command::new(KDP)
        .args(["doctor", "--nonsense"])
        .output()
        .unwrap();
    assert_eq!(wrong.status.code(), Some(2));
}
