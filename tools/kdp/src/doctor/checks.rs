//! What the facts mean for demand paging, and what to do about it.

use super::facts::{Facts, HugePages, Limit, Open};
use serde::Serialize;

/// The oldest kernel that the module builds for.
const OLDEST_KERNEL: (u32, u32) = (7, 2);

/// The stable version of KVM's API.
const KVM_API_VERSION: i32 = 12;

/// A limit of descriptors that is enough for a VMM, a page handler or a keeper.
const ENOUGH_DESCRIPTORS: u64 = 1024;

const VERSION: &str = env!("CARGO_PKG_VERSION");

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Ok,
    /// Demand paging works, but something is missing, slow or unknown.
    Warning,
    /// Demand paging does not work.
    Error,
}

/// What one check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub status: Status,
    pub found: String,
    /// What to do, unless the status is ok.
    pub advice: Option<String>,
}

/// Judges the facts.
pub fn checks(facts: &Facts) -> Vec<Check> {
    let check = |(name, judge): (&'static str, Judge)| {
        let Finding(status, found, advice) = judge(facts);
        Check {
            name,
            status,
            found,
            advice,
        }
    };
    ALL.into_iter().map(check).collect()
}

type Judge = fn(&Facts) -> Finding;

const ALL: [(&str, Judge); 16] = [
    ("kernel", kernel),
    ("config-rust", config_rust),
    ("module-file", module_file),
    ("module", module),
    ("signatures", signatures),
    ("device", device),
    ("abi", abi),
    ("kvm", kvm),
    ("kvm-tracepoints", kvm_tracepoints),
    ("two-dimensional-paging", two_dimensional_paging),
    ("huge-pages-2m", |facts| {
        huge_pages(facts.huge_2m, "2M", "sysctl vm.nr_hugepages=512")
    }),
    ("huge-pages-1g", |facts| {
        let command = "echo 1 >/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages";
        huge_pages(facts.huge_1g, "1G", command)
    }),
    ("shmem-huge-pages", shmem_huge_pages),
    ("rlimit-nofile", rlimit_nofile),
    ("hwpoison", hwpoison),
    ("userfaultfd", userfaultfd),
];

struct Finding(Status, String, Option<String>);

fn ok(found: impl Into<String>) -> Finding {
    Finding(Status::Ok, found.into(), None)
}

fn warning(found: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding(Status::Warning, found.into(), Some(advice.into()))
}

fn error(found: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding(Status::Error, found.into(), Some(advice.into()))
}

const INSTALL_KERNEL: &str =
    "apt install -t trixie-backports linux-image-amd64 linux-headers-amd64 \
     linux-source-7.3, then reboot";

fn kernel(facts: &Facts) -> Finding {
    let Some(release) = &facts.release else {
        return warning(
            "the release is unknown: /proc/sys/kernel/osrelease cannot be read",
            "mount -t proc proc /proc",
        );
    };
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|digits| digits.parse::<u32>().ok());
    match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor)) if (major, minor) >= OLDEST_KERNEL => ok(release),
        _ => {
            let (major, minor) = OLDEST_KERNEL;
            error(
                format!("{release}; the module needs {major}.{minor} or later"),
                INSTALL_KERNEL,
            )
        }
    }
}

fn config_rust(facts: &Facts) -> Finding {
    match &facts.config {
        Some(config) if config.has_rust => {
            ok(format!("CONFIG_RUST=y in {}", config.path.display()))
        }
        _ if facts.loaded.is_some() => ok("not checked: the module is loaded"),
        Some(config) => error(
            format!("CONFIG_RUST is not set in {}", config.path.display()),
            format!("use a kernel with CONFIG_RUST=y: {INSTALL_KERNEL}"),
        ),
        None => {
            let release = facts.release.as_deref().unwrap_or("RELEASE");
            warning(
                "unknown: the configuration of the kernel was not found",
                format!(
                    "apt install linux-headers-{release}, or put the configuration at \
                     /boot/config-{release}"
                ),
            )
        }
    }
}

const INSTALL_MODULE: &str =
    "dkms autoinstall, if 'dkms status' lists kvm-demand-paging; if not, make deb, then \
     apt install ./build/deb/kvm-demand-paging-dkms_*.deb";

fn module_file(facts: &Facts) -> Finding {
    let release = facts.release.as_deref().unwrap_or("this kernel");
    match (&facts.installed, &facts.loaded) {
        (Some(installed), _) => {
            let path = installed.path.display();
            match installed.version.as_deref() {
                Some(VERSION) => ok(format!("version {VERSION}, {path}")),
                Some(other) => warning(
                    format!("version {other}, but kdp is {VERSION}: {path}"),
                    "install kdp and the module from the same 'make deb': \
                     apt install ./build/deb/kvm-demand-paging{,-dkms}_*.deb",
                ),
                None => warning(
                    format!("the version is unknown: modinfo shows none for {path}"),
                    "apt install kmod, then check: modinfo -F version kvm_demand_paging",
                ),
            }
        }
        (None, Some(_)) => warning(
            format!(
                "not installed for {release}: the module is loaded now, but not after a reboot"
            ),
            INSTALL_MODULE,
        ),
        (None, None) => error(format!("not installed for {release}"), INSTALL_MODULE),
    }
}

fn module(facts: &Facts) -> Finding {
    const RELOAD: &str = "end all VMMs that use it, then: \
                          modprobe -r kvm_demand_paging && modprobe kvm_demand_paging";
    match &facts.loaded {
        Some(Some(version)) if version == VERSION => ok(format!("version {VERSION} is loaded")),
        Some(Some(other)) => warning(
            format!("version {other} is loaded, but kdp is {VERSION}"),
            RELOAD,
        ),
        Some(None) => warning("loaded, but its version is unknown", RELOAD),
        None if facts.installed.is_some() => error("not loaded", "modprobe kvm_demand_paging"),
        None => error(
            "not loaded",
            format!("{INSTALL_MODULE}, then: modprobe kvm_demand_paging"),
        ),
    }
}

fn signatures(facts: &Facts) -> Finding {
    let enforced = match (&facts.lockdown, facts.is_signature_enforced) {
        (Some(mode), _) => format!("the kernel loads signed modules only: lockdown is {mode}"),
        (None, true) => "the kernel loads signed modules only: sig_enforce is on".to_owned(),
        (None, false) => return ok("the kernel also loads modules without a signature"),
    };
    match facts.loaded {
        Some(_) => ok(format!("{enforced}; this module is loaded")),
        None => warning(
            enforced,
            "enroll the key that DKMS signs with: \
             mokutil --import /var/lib/dkms/mok.pub, then reboot",
        ),
    }
}

fn device(facts: &Facts) -> Finding {
    const PATH: &str = "/dev/kvm-demand-paging";
    let rights = facts.device.as_ref().map_or_else(
        || PATH.to_owned(),
        |node| {
            let (mode, owner, group) = (node.mode, &node.owner, &node.group);
            format!("{PATH} is {mode:04o} {owner}:{group}")
        },
    );
    let user = &facts.user;
    match &facts.device_open {
        Open::Opened => ok(format!("{rights}; {user} can open it")),
        Open::Missing if facts.loaded.is_some() => error(
            format!("{PATH} does not exist"),
            "mount -t devtmpfs devtmpfs /dev; in a container, pass the device to it",
        ),
        Open::Missing => error(
            format!("{PATH} does not exist: the module is not loaded"),
            "follow the advice for 'module'",
        ),
        Open::Denied => error(
            format!("{rights}; {user} may not open it for reading and writing"),
            access_advice(facts),
        ),
        Open::Failed(reason) => error(
            format!("{rights}; {user} cannot open it: {reason}"),
            "modprobe -r kvm_demand_paging && modprobe kvm_demand_paging",
        ),
    }
}

/// Advice on access to the device. Its group is named if the group may read and write it.
fn access_advice(facts: &Facts) -> String {
    match &facts.device {
        Some(node) if node.mode & 0o060 == 0o060 && node.group != "root" => {
            format!(
                "usermod -aG {} {}, then log in again",
                node.group, facts.user
            )
        }
        _ => "run as root, or install the udev rule, which gives the group kdp access: \
              apt install ./build/deb/kvm-demand-paging_*.deb"
            .to_owned(),
    }
}

fn abi(facts: &Facts) -> Finding {
    match &facts.info {
        Some(Ok(info)) => ok(format!("version {}", info.api_version)),
        Some(Err(reason)) => error(
            reason,
            "install kdp and the module from the same release, then reload the module: \
             modprobe -r kvm_demand_paging && modprobe kvm_demand_paging",
        ),
        None => warning(
            "unknown: the device cannot be opened",
            "follow the advice for 'device'",
        ),
    }
}

fn kvm(facts: &Facts) -> Finding {
    const LOAD: &str = "modprobe kvm_amd (AMD) or kvm_intel (Intel); if that fails, \
                        enable SVM or VT-x in the firmware";
    let vendor = facts.kvm_vendor.as_ref().map(|vendor| vendor.module);
    match (&facts.kvm_open, facts.kvm_version) {
        (Open::Opened, Some(KVM_API_VERSION)) => ok(format!(
            "API version {KVM_API_VERSION}, {}",
            vendor.unwrap_or("neither kvm_amd nor kvm_intel")
        )),
        (Open::Opened, version) => error(
            format!(
                "/dev/kvm reports API version {}, not {KVM_API_VERSION}",
                version.unwrap_or(-1)
            ),
            "use a kernel with KVM's stable API, 2.6.22 or later",
        ),
        (Open::Missing, _) => error("/dev/kvm does not exist", LOAD),
        (Open::Denied, _) => error(
            format!(
                "{} may not open /dev/kvm for reading and writing",
                facts.user
            ),
            format!("usermod -aG kvm {}, then log in again", facts.user),
        ),
        (Open::Failed(reason), _) => error(format!("/dev/kvm cannot be opened: {reason}"), LOAD),
    }
}

fn kvm_tracepoints(facts: &Facts) -> Finding {
    // Ask the module. If its device cannot be opened, look into tracefs.
    let module = match &facts.info {
        Some(Ok(info)) => Some(info.features.exits()),
        _ => None,
    };
    let who = if module.is_some() {
        "the module"
    } else {
        "tracefs"
    };
    match module.or(facts.tracepoints) {
        Some(true) => ok(format!(
            "{who} has the tracepoints: missing pages cause vCPU exits"
        )),
        Some(false) => warning(
            format!("{who} lacks the tracepoints: a vCPU waits for a missing page and never exits"),
            "modprobe kvm_amd or kvm_intel, on a kernel with CONFIG_TRACEPOINTS=y",
        ),
        None => warning(
            "unknown: the module cannot be asked, and tracefs cannot be read",
            "load the module, or run 'kdp doctor' as root",
        ),
    }
}

fn two_dimensional_paging(facts: &Facts) -> Finding {
    let Some(vendor) = &facts.kvm_vendor else {
        return warning(
            "unknown: neither kvm_amd nor kvm_intel is loaded",
            "follow the advice for 'kvm'",
        );
    };
    let (module, parameter) = (vendor.module, vendor.parameter);
    match vendor.is_two_dimensional {
        Some(true) => ok(format!("{module} uses {}", parameter.to_uppercase())),
        Some(false) => warning(
            format!("{module} has {parameter}=0: a vCPU waits for a missing page and never exits"),
            format!("modprobe -r {module} && modprobe {module} {parameter}=1"),
        ),
        None => warning(
            format!("unknown: /sys/module/{module}/parameters/{parameter} cannot be read"),
            "run 'kdp doctor' as root",
        ),
    }
}

fn huge_pages(pages: Option<HugePages>, size: &str, command: &str) -> Finding {
    match pages {
        Some(HugePages { total: 0, .. }) => warning(
            format!("none: memslots of --hugetlb {size} cannot be created"),
            command,
        ),
        Some(HugePages { total, free: 0 }) => warning(
            format!("0 of {total} free"),
            format!("{command}, with a larger number"),
        ),
        Some(HugePages { total, free }) => ok(format!("{free} of {total} free")),
        None => warning(
            format!("this kernel or processor has no huge pages of {size}"),
            "use another size, or --shmem",
        ),
    }
}

fn shmem_huge_pages(facts: &Facts) -> Finding {
    const COMMAND: &str = "echo within_size >/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    match facts.shmem_enabled.as_deref() {
        Some(value @ ("always" | "within_size" | "force")) => {
            ok(format!("shmem_enabled is {value}"))
        }
        Some("advise") => warning(
            "shmem_enabled is advise: only memory with madvise(MADV_HUGEPAGE) gets huge pages",
            COMMAND,
        ),
        Some(value) => warning(
            format!("shmem_enabled is {value}: memslots of --shmem have pages of 4 KiB only"),
            COMMAND,
        ),
        None => warning(
            "this kernel has no huge pages for shmem: memslots of --shmem have pages of 4 KiB only",
            "use --hugetlb, or a kernel with CONFIG_TRANSPARENT_HUGEPAGE=y",
        ),
    }
}

fn rlimit_nofile(facts: &Facts) -> Finding {
    match facts.nofile {
        Some(Limit::Unlimited) => ok("unlimited"),
        Some(Limit::Is(count)) if count >= ENOUGH_DESCRIPTORS => ok(format!("{count} descriptors")),
        Some(Limit::Is(count)) => warning(
            format!("{count} descriptors: many VMs or memslots need more"),
            format!(
                "ulimit -n {ENOUGH_DESCRIPTORS}; in a systemd unit: LimitNOFILE={ENOUGH_DESCRIPTORS}"
            ),
        ),
        None => warning("unknown: /proc/self/limits cannot be read", "ulimit -n"),
    }
}

fn hwpoison(facts: &Facts) -> Finding {
    match facts.memory_failure {
        Some(true) => ok("the kernel handles memory errors"),
        Some(false) => warning(
            "the kernel does not handle memory errors: a memory error ends the host or its VMM",
            "use a kernel with CONFIG_MEMORY_FAILURE=y",
        ),
        None => warning(
            "unknown: /proc/meminfo cannot be read",
            "mount -t proc proc /proc",
        ),
    }
}

fn userfaultfd(facts: &Facts) -> Finding {
    let unprivileged = match facts.unprivileged_userfaultfd {
        Some(true) => "for all users",
        Some(false) => "unprivileged users get faults from user mode only",
        None => {
            return warning(
                "this kernel has no userfaultfd; only kdp-bench uses it, for comparison",
                "for a comparison, use a kernel with CONFIG_USERFAULTFD=y",
            )
        }
    };
    let device = if facts.userfaultfd {
        "/dev/userfaultfd exists"
    } else {
        "no /dev/userfaultfd"
    };
    ok(format!(
        "{unprivileged}; {device}; only kdp-bench uses it, for comparison"
    ))
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::facts::{Config, Installed, KvmVendor, Node};
    use super::*;
    use kvm_demand_paging::{Features, Info};

    const RELEASE: &str = "7.3.4+deb13-amd64";

    /// A host on which every check is ok.
    pub(in super::super) fn good() -> Facts {
        Facts {
            release: Some(RELEASE.to_owned()),
            config: Some(Config {
                path: "/boot/config-7.3.4+deb13-amd64".into(),
                has_rust: true,
            }),
            installed: Some(Installed {
                path: "/lib/modules/7.3.4+deb13-amd64/updates/dkms/kvm_demand_paging.ko.xz".into(),
                version: Some(VERSION.to_owned()),
            }),
            loaded: Some(Some(VERSION.to_owned())),
            device: Some(Node {
                mode: 0o660,
                owner: "root".to_owned(),
                group: "kdp".to_owned(),
            }),
            device_open: Open::Opened,
            info: Some(Ok(Info {
                api_version: 1,
                // KDP_FEATURE_EXITS
                features: Features(1),
                max_pages: 1,
                max_memslots: 1,
                max_vcpu_threads: 1,
                max_ranges: 1,
            })),
            user: "alice".to_owned(),
            kvm_open: Open::Opened,
            kvm_version: Some(12),
            kvm_vendor: Some(KvmVendor {
                module: "kvm_amd",
                parameter: "npt",
                is_two_dimensional: Some(true),
            }),
            tracepoints: None,
            huge_2m: Some(HugePages { total: 8, free: 5 }),
            huge_1g: Some(HugePages { total: 2, free: 2 }),
            shmem_enabled: Some("within_size".to_owned()),
            nofile: Some(Limit::Is(1024)),
            memory_failure: Some(true),
            userfaultfd: true,
            unprivileged_userfaultfd: Some(false),
            is_signature_enforced: false,
            lockdown: None,
        }
    }

    fn judged(name: &str, facts: &Facts) -> (Status, String, String) {
        let check = checks(facts).into_iter().find(|check| check.name == name);
        let check = check.unwrap();
        (check.status, check.found, check.advice.unwrap_or_default())
    }

    /// Asserts the result of the check of this name on a good host with one change.
    #[track_caller]
    fn expect(
        name: &str,
        change: impl FnOnce(&mut Facts),
        status: Status,
        found: &str,
        advice: &str,
    ) {
        let mut facts = good();
        change(&mut facts);
        let expected = (status, found.to_owned(), advice.to_owned());
        assert_eq!(judged(name, &facts), expected);
    }

    #[test]
    fn doctor_a_good_host() {
        for check in checks(&good()) {
            assert_eq!(
                (check.status, &check.advice),
                (Status::Ok, &None),
                "{check:?}"
            );
        }
        let expect = |name, found| assert_eq!(judged(name, &good()).1, found);
        expect("kernel", RELEASE);
        expect(
            "config-rust",
            "CONFIG_RUST=y in /boot/config-7.3.4+deb13-amd64",
        );
        expect(
            "device",
            "/dev/kvm-demand-paging is 0660 root:kdp; alice can open it",
        );
        expect("kvm", "API version 12, kvm_amd");
        expect(
            "kvm-tracepoints",
            "the module has the tracepoints: missing pages cause vCPU exits",
        );
        expect("two-dimensional-paging", "kvm_amd uses NPT");
        expect("huge-pages-2m", "5 of 8 free");
        expect(
            "signatures",
            "the kernel also loads modules without a signature",
        );
    }

    #[test]
    fn doctor_kernel() {
        let release =
            |text: &'static str| move |facts: &mut Facts| facts.release = Some(text.to_owned());
        for old in [
            "7.1.9-amd64",
            "6.12.48+deb13-amd64",
            "2.6.32",
            "nonsense",
            "7",
        ] {
            let found = format!("{old}; the module needs 7.2 or later");
            expect(
                "kernel",
                release(old),
                Status::Error,
                &found,
                INSTALL_KERNEL,
            );
        }
        for new in ["7.2.12+deb13-amd64", "7.10.0", "8.0.0-rc1"] {
            expect("kernel", release(new), Status::Ok, new, "");
        }
        expect(
            "kernel",
            |facts| facts.release = None,
            Status::Warning,
            "the release is unknown: /proc/sys/kernel/osrelease cannot be read",
            "mount -t proc proc /proc",
        );
    }

    #[test]
    fn doctor_config_rust() {
        let off = |facts: &mut Facts| {
            facts.loaded = None;
            facts.config = Some(Config {
                path: "/boot/config-x".into(),
                has_rust: false,
            });
        };
        expect(
            "config-rust",
            off,
            Status::Error,
            "CONFIG_RUST is not set in /boot/config-x",
            "use a kernel with CONFIG_RUST=y: apt install -t trixie-backports linux-image-amd64 \
             linux-headers-amd64 linux-source-7.3, then reboot",
        );
        expect(
            "config-rust",
            |facts| {
                facts.loaded = None;
                facts.config = None;
            },
            Status::Warning,
            "unknown: the configuration of the kernel was not found",
            "apt install linux-headers-7.3.4+deb13-amd64, or put the configuration at \
             /boot/config-7.3.4+deb13-amd64",
        );
        expect(
            "config-rust",
            |facts| facts.config = None,
            Status::Ok,
            "not checked: the module is loaded",
            "",
        );
    }

    #[test]
    fn doctor_module_file() {
        expect(
            "module-file",
            |facts| facts.installed.as_mut().unwrap().version = Some("0.8.0".to_owned()),
            Status::Warning,
            "version 0.8.0, but kdp is 0.9.0: \
             /lib/modules/7.3.4+deb13-amd64/updates/dkms/kvm_demand_paging.ko.xz",
            "install kdp and the module from the same 'make deb': \
             apt install ./build/deb/kvm-demand-paging{,-dkms}_*.deb",
        );
        expect(
            "module-file",
            |facts| facts.installed.as_mut().unwrap().version = None,
            Status::Warning,
            "the version is unknown: modinfo shows none for \
             /lib/modules/7.3.4+deb13-amd64/updates/dkms/kvm_demand_paging.ko.xz",
            "apt install kmod, then check: modinfo -F version kvm_demand_paging",
        );
        expect(
            "module-file",
            |facts| facts.installed = None,
            Status::Warning,
            "not installed for 7.3.4+deb13-amd64: \
             the module is loaded now, but not after a reboot",
            "dkms autoinstall, if 'dkms status' lists kvm-demand-paging; if not, make deb, then \
             apt install ./build/deb/kvm-demand-paging-dkms_*.deb",
        );
        expect(
            "module-file",
            |facts| (facts.installed, facts.loaded) = (None, None),
            Status::Error,
            "not installed for 7.3.4+deb13-amd64",
            "dkms autoinstall, if 'dkms status' lists kvm-demand-paging; if not, make deb, then \
             apt install ./build/deb/kvm-demand-paging-dkms_*.deb",
        );
    }

    #[test]
    fn doctor_module() {
        let reload = "end all VMMs that use it, then: \
                      modprobe -r kvm_demand_paging && modprobe kvm_demand_paging";
        expect(
            "module",
            |facts| facts.loaded = Some(Some("0.8.0".to_owned())),
            Status::Warning,
            "version 0.8.0 is loaded, but kdp is 0.9.0",
            reload,
        );
        expect(
            "module",
            |facts| facts.loaded = Some(None),
            Status::Warning,
            "loaded, but its version is unknown",
            reload,
        );
        expect(
            "module",
            |facts| facts.loaded = None,
            Status::Error,
            "not loaded",
            "modprobe kvm_demand_paging",
        );
        expect(
            "module",
            |facts| (facts.installed, facts.loaded) = (None, None),
            Status::Error,
            "not loaded",
            "dkms autoinstall, if 'dkms status' lists kvm-demand-paging; if not, make deb, then \
             apt install ./build/deb/kvm-demand-paging-dkms_*.deb, then: \
             modprobe kvm_demand_paging",
        );
    }

    #[test]
    fn doctor_signatures() {
        let mok = "enroll the key that DKMS signs with: \
                   mokutil --import /var/lib/dkms/mok.pub, then reboot";
        expect(
            "signatures",
            |facts| (facts.loaded, facts.lockdown) = (None, Some("integrity".to_owned())),
            Status::Warning,
            "the kernel loads signed modules only: lockdown is integrity",
            mok,
        );
        expect(
            "signatures",
            |facts| (facts.loaded, facts.is_signature_enforced) = (None, true),
            Status::Warning,
            "the kernel loads signed modules only: sig_enforce is on",
            mok,
        );
        expect(
            "signatures",
            |facts| facts.is_signature_enforced = true,
            Status::Ok,
            "the kernel loads signed modules only: sig_enforce is on; this module is loaded",
            "",
        );
    }

    #[test]
    fn doctor_device() {
        let denied = |mode, group: &'static str| {
            move |facts: &mut Facts| {
                facts.device_open = Open::Denied;
                facts.device = Some(Node {
                    mode,
                    owner: "root".to_owned(),
                    group: group.to_owned(),
                });
            }
        };
        let udev = "run as root, or install the udev rule, which gives the group kdp access: \
                    apt install ./build/deb/kvm-demand-paging_*.deb";
        expect(
            "device",
            denied(0o660, "kdp"),
            Status::Error,
            "/dev/kvm-demand-paging is 0660 root:kdp; \
             alice may not open it for reading and writing",
            "usermod -aG kdp alice, then log in again",
        );
        for (mode, group) in [(0o600, "root"), (0o640, "kdp"), (0o660, "root")] {
            expect(
                "device",
                denied(mode, group),
                Status::Error,
                &format!(
                    "/dev/kvm-demand-paging is {mode:04o} root:{group}; \
                     alice may not open it for reading and writing"
                ),
                udev,
            );
        }
        expect(
            "device",
            |facts| facts.device_open = Open::Failed("No such device".to_owned()),
            Status::Error,
            "/dev/kvm-demand-paging is 0660 root:kdp; alice cannot open it: No such device",
            "modprobe -r kvm_demand_paging && modprobe kvm_demand_paging",
        );
        let missing = |facts: &mut Facts| (facts.device, facts.device_open) = (None, Open::Missing);
        expect(
            "device",
            missing,
            Status::Error,
            "/dev/kvm-demand-paging does not exist",
            "mount -t devtmpfs devtmpfs /dev; in a container, pass the device to it",
        );
        expect(
            "device",
            |facts| {
                missing(facts);
                facts.loaded = None;
            },
            Status::Error,
            "/dev/kvm-demand-paging does not exist: the module is not loaded",
            "follow the advice for 'module'",
        );
    }

    #[test]
    fn doctor_abi() {
        expect(
            "abi",
            |facts| facts.info = Some(Err("the module has version 2 of the ABI".to_owned())),
            Status::Error,
            "the module has version 2 of the ABI",
            "install kdp and the module from the same release, then reload the module: \
             modprobe -r kvm_demand_paging && modprobe kvm_demand_paging",
        );
        expect(
            "abi",
            |facts| facts.info = None,
            Status::Warning,
            "unknown: the device cannot be opened",
            "follow the advice for 'device'",
        );
    }

    #[test]
    fn doctor_kvm() {
        let load =
            "modprobe kvm_amd (AMD) or kvm_intel (Intel); if that fails, enable SVM or VT-x in the \
                    firmware";
        expect(
            "kvm",
            |facts| facts.kvm_open = Open::Missing,
            Status::Error,
            "/dev/kvm does not exist",
            load,
        );
        expect(
            "kvm",
            |facts| facts.kvm_open = Open::Failed("No such device".to_owned()),
            Status::Error,
            "/dev/kvm cannot be opened: No such device",
            load,
        );
        expect(
            "kvm",
            |facts| facts.kvm_open = Open::Denied,
            Status::Error,
            "alice may not open /dev/kvm for reading and writing",
            "usermod -aG kvm alice, then log in again",
        );
        expect(
            "kvm",
            |facts| facts.kvm_version = Some(-1),
            Status::Error,
            "/dev/kvm reports API version -1, not 12",
            "use a kernel with KVM's stable API, 2.6.22 or later",
        );
    }

    #[test]
    fn doctor_kvm_tracepoints() {
        let load = "modprobe kvm_amd or kvm_intel, on a kernel with CONFIG_TRACEPOINTS=y";
        expect(
            "kvm-tracepoints",
            |facts| {
                // What the module reports counts.
                facts.tracepoints = Some(true);
                facts.info.as_mut().unwrap().as_mut().unwrap().features = Features(0);
            },
            Status::Warning,
            "the module lacks the tracepoints: a vCPU waits for a missing page and never exits",
            load,
        );
        expect(
            "kvm-tracepoints",
            |facts| (facts.info, facts.tracepoints) = (None, Some(false)),
            Status::Warning,
            "tracefs lacks the tracepoints: a vCPU waits for a missing page and never exits",
            load,
        );
        expect(
            "kvm-tracepoints",
            |facts| (facts.info, facts.tracepoints) = (None, Some(true)),
            Status::Ok,
            "tracefs has the tracepoints: missing pages cause vCPU exits",
            "",
        );
        expect(
            "kvm-tracepoints",
            |facts| facts.info = None,
            Status::Warning,
            "unknown: the module cannot be asked, and tracefs cannot be read",
            "load the module, or run 'kdp doctor' as root",
        );
    }

    #[test]
    fn doctor_two_dimensional_paging() {
        let is = |value| {
            move |facts: &mut Facts| facts.kvm_vendor.as_mut().unwrap().is_two_dimensional = value
        };
        expect(
            "two-dimensional-paging",
            is(Some(false)),
            Status::Warning,
            "kvm_amd has npt=0: a vCPU waits for a missing page and never exits",
            "modprobe -r kvm_amd && modprobe kvm_amd npt=1",
        );
        expect(
            "two-dimensional-paging",
            is(None),
            Status::Warning,
            "unknown: /sys/module/kvm_amd/parameters/npt cannot be read",
            "run 'kdp doctor' as root",
        );
        expect(
            "two-dimensional-paging",
            |facts| facts.kvm_vendor = None,
            Status::Warning,
            "unknown: neither kvm_amd nor kvm_intel is loaded",
            "follow the advice for 'kvm'",
        );
    }

    #[test]
    fn doctor_huge_pages() {
        expect(
            "huge-pages-2m",
            |facts| facts.huge_2m = Some(HugePages { total: 0, free: 0 }),
            Status::Warning,
            "none: memslots of --hugetlb 2M cannot be created",
            "sysctl vm.nr_hugepages=512",
        );
        expect(
            "huge-pages-1g",
            |facts| facts.huge_1g = Some(HugePages { total: 0, free: 0 }),
            Status::Warning,
            "none: memslots of --hugetlb 1G cannot be created",
            "echo 1 >/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages",
        );
        expect(
            "huge-pages-2m",
            |facts| facts.huge_2m = Some(HugePages { total: 7, free: 0 }),
            Status::Warning,
            "0 of 7 free",
            "sysctl vm.nr_hugepages=512, with a larger number",
        );
        expect(
            "huge-pages-1g",
            |facts| facts.huge_1g = None,
            Status::Warning,
            "this kernel or processor has no huge pages of 1G",
            "use another size, or --shmem",
        );
    }

    #[test]
    fn doctor_shmem_huge_pages() {
        let enabled = |value: &'static str| {
            move |facts: &mut Facts| facts.shmem_enabled = Some(value.to_owned())
        };
        let command = "echo within_size >/sys/kernel/mm/transparent_hugepage/shmem_enabled";
        for value in ["never", "deny"] {
            let found =
                format!("shmem_enabled is {value}: memslots of --shmem have pages of 4 KiB only");
            expect(
                "shmem-huge-pages",
                enabled(value),
                Status::Warning,
                &found,
                command,
            );
        }
        expect(
            "shmem-huge-pages",
            enabled("advise"),
            Status::Warning,
            "shmem_enabled is advise: only memory with madvise(MADV_HUGEPAGE) gets huge pages",
            command,
        );
        expect(
            "shmem-huge-pages",
            |facts| facts.shmem_enabled = None,
            Status::Warning,
            "this kernel has no huge pages for shmem: memslots of --shmem have pages of 4 KiB only",
            "use --hugetlb, or a kernel with CONFIG_TRANSPARENT_HUGEPAGE=y",
        );
    }

    #[test]
    fn doctor_limits() {
        expect(
            "rlimit-nofile",
            |facts| facts.nofile = Some(Limit::Is(256)),
            Status::Warning,
            "256 descriptors: many VMs or memslots need more",
            "ulimit -n 1024; in a systemd unit: LimitNOFILE=1024",
        );
        let unknown = "unknown: /proc/self/limits cannot be read";
        expect(
            "rlimit-nofile",
            |facts| facts.nofile = None,
            Status::Warning,
            unknown,
            "ulimit -n",
        );
    }

    #[test]
    fn doctor_hwpoison() {
        expect(
            "hwpoison",
            |facts| facts.memory_failure = Some(false),
            Status::Warning,
            "the kernel does not handle memory errors: a memory error ends the host or its VMM",
            "use a kernel with CONFIG_MEMORY_FAILURE=y",
        );
        expect(
            "hwpoison",
            |facts| facts.memory_failure = None,
            Status::Warning,
            "unknown: /proc/meminfo cannot be read",
            "mount -t proc proc /proc",
        );
    }

    #[test]
    fn doctor_userfaultfd() {
        expect(
            "userfaultfd",
            |facts| facts.unprivileged_userfaultfd = None,
            Status::Warning,
            "this kernel has no userfaultfd; only kdp-bench uses it, for comparison",
            "for a comparison, use a kernel with CONFIG_USERFAULTFD=y",
        );
        expect(
            "userfaultfd",
            |facts| (facts.userfaultfd, facts.unprivileged_userfaultfd) = (false, Some(true)),
            Status::Ok,
            "for all users; no /dev/userfaultfd; only kdp-bench uses it, for comparison",
            "",
        );
    }
}
