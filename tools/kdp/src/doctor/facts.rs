//! Facts about a host, without a judgement. Gathering never fails: an unknown fact is `None`.

use flate2::read::GzDecoder;
use kvm_demand_paging::{Info, Vm};
use kvm_ioctls::Kvm;
use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, Read},
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
    process::Command,
};

/// The facts about a host that concern demand paging.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    pub release: Option<String>,
    pub config: Option<Config>,
    pub installed: Option<Installed>,
    /// The loaded module, with its version if it shows one.
    pub loaded: Option<Option<String>>,
    pub device: Option<Node>,
    pub device_open: Open,
    /// What KDP_INFO returned, or why it failed. `None` if the device could not be opened.
    pub info: Option<Result<Info, String>>,
    pub user: String,
    pub kvm_open: Open,
    pub kvm_version: Option<i32>,
    pub kvm_vendor: Option<KvmVendor>,
    /// Whether tracefs has the tracepoints that exits need.
    pub tracepoints: Option<bool>,
    pub huge_2m: Option<HugePages>,
    pub huge_1g: Option<HugePages>,
    /// The value of shmem_enabled that is selected.
    pub shmem_enabled: Option<String>,
    pub nofile: Option<Limit>,
    pub memory_failure: Option<bool>,
    pub userfaultfd: bool,
    pub unprivileged_userfaultfd: Option<bool>,
    pub is_signature_enforced: bool,
    /// The lockdown mode, unless it is "none".
    pub lockdown: Option<String>,
}

/// The configuration of the running kernel.
#[derive(Clone, Debug)]
pub struct Config {
    pub path: PathBuf,
    pub has_rust: bool,
}

/// The module that `modprobe` would load.
#[derive(Clone, Debug)]
pub struct Installed {
    pub path: PathBuf,
    pub version: Option<String>,
}

/// The owner, group and mode of a device node.
#[derive(Clone, Debug)]
pub struct Node {
    pub mode: u32,
    pub owner: String,
    pub group: String,
}

/// The result of opening a device node for reading and writing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Open {
    Opened,
    #[default]
    Missing,
    Denied,
    Failed(String),
}

impl From<&io::Error> for Open {
    fn from(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Missing,
            io::ErrorKind::PermissionDenied => Self::Denied,
            _ => Self::Failed(error.to_string()),
        }
    }
}

/// KVM's module for a vendor's processors.
#[derive(Clone, Debug)]
pub struct KvmVendor {
    pub module: &'static str,
    /// Its parameter that says whether it uses two-dimensional paging.
    pub parameter: &'static str,
    pub is_two_dimensional: Option<bool>,
}

/// Huge pages of one size.
#[derive(Clone, Copy, Debug)]
pub struct HugePages {
    pub total: u64,
    pub free: u64,
}

/// The soft value of a resource limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    Unlimited,
    Is(u64),
}

impl Facts {
    /// Gathers the facts about the host with this root directory.
    pub fn gather(root: &Path) -> Self {
        let host = Host { root };
        let release = host.text("proc/sys/kernel/osrelease");
        let of_release = release.clone().unwrap_or_default();
        let status = host.text("proc/self/status").unwrap_or_default();
        let vm = host.open("dev/kvm-demand-paging");
        let kvm = host.open_kvm();
        let lockdown = host
            .text("sys/kernel/security/lockdown")
            .and_then(|text| selected(&text));
        Self {
            config: host.config(&of_release),
            installed: host.installed(&of_release),
            loaded: host.loaded(),
            device: host.node("dev/kvm-demand-paging"),
            device_open: outcome(&vm),
            info: vm.ok().map(info),
            user: host.name_in("etc/passwd", effective(&status, "Uid:")),
            kvm_open: outcome(&kvm),
            kvm_version: kvm.ok().map(|kvm| kvm.get_api_version()),
            kvm_vendor: host.kvm_vendor(),
            tracepoints: host.tracepoints(),
            huge_2m: host.huge_pages(2048),
            huge_1g: host.huge_pages(1 << 20),
            shmem_enabled: host
                .text("sys/kernel/mm/transparent_hugepage/shmem_enabled")
                .and_then(|text| selected(&text)),
            nofile: host.limit("Max open files"),
            memory_failure: host
                .text("proc/meminfo")
                .map(|text| text.contains("HardwareCorrupted:")),
            userfaultfd: host.path("dev/userfaultfd").exists(),
            unprivileged_userfaultfd: host.switch("proc/sys/vm/unprivileged_userfaultfd"),
            is_signature_enforced: host
                .switch("sys/module/module/parameters/sig_enforce")
                .unwrap_or(false),
            lockdown: lockdown.filter(|mode| mode != "none"),
            release,
        }
    }
}

/// A host by its root directory.
struct Host<'a> {
    root: &'a Path,
}

impl Host<'_> {
    fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.root.join(path)
    }

    /// The text of a file, without white space at its ends.
    fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        let text = fs::read_to_string(self.path(path)).ok()?;
        Some(text.trim().to_owned())
    }

    fn number(&self, path: impl AsRef<Path>) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    /// Reads a parameter that is on or off.
    fn switch(&self, path: impl AsRef<Path>) -> Option<bool> {
        self.text(path)
            .map(|text| matches!(text.as_str(), "Y" | "1"))
    }

    fn config(&self, release: &str) -> Option<Config> {
        let modules = Path::new("lib/modules").join(release);
        let candidates = [
            Path::new("boot").join(format!("config-{release}")),
            modules.join("config"),
            modules.join("build/.config"),
            "proc/config.gz".into(),
        ];
        candidates.into_iter().find_map(|path| {
            let bytes = fs::read(self.path(&path)).ok()?;
            let mut text = String::new();
            match path.extension() {
                Some(extension) if extension == "gz" => {
                    GzDecoder::new(&*bytes).read_to_string(&mut text).ok()?
                }
                _ => (&*bytes).read_to_string(&mut text).ok()?,
            };
            Some(Config {
                path: Path::new("/").join(path),
                has_rust: text.lines().any(|line| line == "CONFIG_RUST=y"),
            })
        })
    }

    fn installed(&self, release: &str) -> Option<Installed> {
        let modules = Path::new("lib/modules").join(release);
        let path = self
            .text(modules.join("modules.dep"))?
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(path, _)| modules.join(path))
            .find(|path| {
                let name = path.file_name().map(|name| name.to_string_lossy());
                name.is_some_and(|name| name.starts_with("kvm_demand_paging.ko"))
            })?;
        // modinfo reads modules of every compression. The PATH of a user lacks /usr/sbin.
        let programs = ["modinfo", "/usr/sbin/modinfo", "/sbin/modinfo"];
        let modinfo = programs.into_iter().find_map(|program| {
            Command::new(program)
                .args(["-F", "version"])
                .arg(self.path(&path))
                .output()
                .ok()
        });
        let version = modinfo
            .and_then(|output| String::from_utf8(output.stdout).ok())
            .map(|version| version.trim().to_owned())
            .filter(|version| !version.is_empty());
        Some(Installed {
            path: Path::new("/").join(path),
            version,
        })
    }

    fn loaded(&self) -> Option<Option<String>> {
        let module = Path::new("sys/module/kvm_demand_paging");
        self.path(module)
            .exists()
            .then(|| self.text(module.join("version")))
    }

    fn node(&self, path: &str) -> Option<Node> {
        let metadata = fs::metadata(self.path(path)).ok()?;
        Some(Node {
            mode: metadata.mode() & 0o7777,
            owner: self.name_in("etc/passwd", Some(metadata.uid())),
            group: self.name_in("etc/group", Some(metadata.gid())),
        })
    }

    /// The name of a user or a group, or its number if it has no name.
    fn name_in(&self, database: &str, id: Option<u32>) -> String {
        let Some(id) = id.map(|id| id.to_string()) else {
            return "unknown".to_owned();
        };
        let text = self.text(database).unwrap_or_default();
        let name = text.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)? == id).then(|| name.to_owned())
        });
        name.unwrap_or(id)
    }

    fn open(&self, path: &str) -> io::Result<File> {
        File::options().read(true).write(true).open(self.path(path))
    }

    fn open_kvm(&self) -> io::Result<Kvm> {
        let path = CString::new(self.path("dev/kvm").as_os_str().as_bytes())?;
        Kvm::new_with_path(path).map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }

    fn kvm_vendor(&self) -> Option<KvmVendor> {
        let mut vendors = [("kvm_amd", "npt"), ("kvm_intel", "ept")];
        // Where both are built in, both have a folder: the one for this CPU counts.
        if self
            .text("proc/cpuinfo")
            .is_some_and(|text| text.contains("GenuineIntel"))
        {
            vendors.reverse();
        }
        vendors.into_iter().find_map(|(module, parameter)| {
            let path = Path::new("sys/module").join(module);
            self.path(&path).exists().then(|| KvmVendor {
                module,
                parameter,
                is_two_dimensional: self.switch(path.join("parameters").join(parameter)),
            })
        })
    }

    fn tracepoints(&self) -> Option<bool> {
        let events = [
            "sys/kernel/tracing/events",
            "sys/kernel/debug/tracing/events",
        ]
        .into_iter()
        .map(|path| self.path(path).join("kvm"))
        .find(|path| {
            path.parent()
                .is_some_and(|events| events.read_dir().is_ok())
        })?;
        let names = ["kvm_page_fault", "kvm_userspace_exit"];
        Some(names.iter().all(|name| events.join(name).exists()))
    }

    fn huge_pages(&self, kib: u64) -> Option<HugePages> {
        let dir = PathBuf::from(format!("sys/kernel/mm/hugepages/hugepages-{kib}kB"));
        Some(HugePages {
            total: self.number(dir.join("nr_hugepages"))?,
            // Free pages that a mapping has reserved are not for others.
            free: self
                .number(dir.join("free_hugepages"))?
                .saturating_sub(self.number(dir.join("resv_hugepages")).unwrap_or(0)),
        })
    }

    fn limit(&self, name: &str) -> Option<Limit> {
        let limits = self.text("proc/self/limits")?;
        let values = limits.lines().find_map(|line| line.strip_prefix(name))?;
        match values.split_whitespace().next()? {
            "unlimited" => Some(Limit::Unlimited),
            value => value.parse().ok().map(Limit::Is),
        }
    }
}

fn outcome<T>(result: &io::Result<T>) -> Open {
    match result {
        Ok(_) => Open::Opened,
        Err(error) => error.into(),
    }
}

fn info(device: File) -> Result<Info, String> {
    Vm::from_fd(device.into())
        .and_then(|vm| vm.info())
        .map_err(|error| error.to_string())
}

/// The word in brackets: the value that is selected in a file that lists all values.
fn selected(text: &str) -> Option<String> {
    let (_, after) = text.split_once('[')?;
    let (word, _) = after.split_once(']')?;
    Some(word.to_owned())
}

/// The effective id in a line of /proc/PID/status: the second one.
fn effective(status: &str, key: &str) -> Option<u32> {
    let ids = status.lines().find_map(|line| line.strip_prefix(key))?;
    ids.split_whitespace().nth(1)?.parse().ok()
}
