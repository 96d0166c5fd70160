//! The command as a script uses it, without the module.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use kvm_demand_paging::{
    source::{Client, Content, Options, PageSource},
    PageRange,
};
use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

const KDP: &str = env!("CARGO_BIN_EXE_kdp");
const LONG: Duration = Duration::from_secs(20);

fn kdp(args: &[&str]) -> Output {
    Command::new(KDP).args(args).output().unwrap()
}

/// The one line on standard error of a command that fails with this status.
fn complaint(args: &[&str]) -> String {
    let output = kdp(args);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

fn wait_for(path: &Path) {
    let start = Instant::now();
    while !path.exists() {
        assert!(start.elapsed() < LONG, "{} does not appear", path.display());
        thread::sleep(Duration::from_millis(5));
    }
}

struct Running {
    child: Child,
    out: BufReader<std::process::ChildStdout>,
}

impl Running {
    fn start(args: &[&str], ready: &Path) -> Self {
        let mut child = Command::new(KDP)
            .args(args)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        wait_for(ready);
        assert_eq!(
            fs::read_to_string(ready).unwrap(),
            format!("{}\n", child.id())
        );
        Self { child, out }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill")
            .args([name, &pid])
            .status()
            .unwrap()
            .success());
    }

    /// End it; what it printed after the lines that were read.
    fn end(mut self) -> String {
        self.signal("-TERM");
        let mut rest = String::new();
        self.out.read_to_string(&mut rest).unwrap();
        assert!(self.child.wait().unwrap().success());
        rest
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended already, unless a test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    (dir, path)
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[test]
fn serve_counts_what_it_sends() {
    let (_dir, dir) = folder();
    let (ram, ready) = (dir.join("ram@1"), dir.join("ready"));
    // The first page is skipped, the second holds data, the third is zeros.
    fs::write(&ram, [[9; 4096], [1; 4096], [0; 4096]].concat()).unwrap();
    let file = format!("{}@4096", text(&ram));
    let args = [
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--json",
        "--ready-file",
        &text(&ready),
        &file,
    ];
    let mut server = Running::start(&args, &ready);
    assert!(server.line().ends_with("(2 pages of 4096 bytes)"));
    let address = server.line();
    let address = address
        .strip_prefix("listening at ")
        .unwrap()
        .parse()
        .unwrap();

    let client = Client::connect(address, Options::default()).unwrap();
    client.request(&[PageRange::new(0, 2)]).unwrap();
    let mut came = Vec::new();
    while client.outstanding() > 0 {
        let mut sink = |range: PageRange, content: Content<'_>| {
            came.push((range.first, content == Content::Zero))
        };
        client.recv(LONG, &mut sink).unwrap();
    }
    assert_eq!(came, [(0, false), (1, true)]);

    server.signal("-USR1");
    let now: serde_json::Value = serde_json::from_str(&server.line()).unwrap();
    assert_eq!((&now["pages"], &now["zero_pages"]), (&2.into(), &1.into()));
    let end: serde_json::Value = serde_json::from_str(server.end().trim()).unwrap();
    assert_eq!(end, now);
    assert!(!ready.exists());
}

#[test]
fn keep_comes_and_goes() {
    let (_dir, dir) = folder();
    let (socket, ready) = (dir.join("keeper"), dir.join("ready"));
    let at = format!("unix:{}", text(&socket));
    let mut keeper = Running::start(
        &["keep", "--listen", &at, "--ready-file", &text(&ready)],
        &ready,
    );
    assert_eq!(keeper.line(), format!("listening at {at}"));
    assert!(kdp(&["kept", "--at", &at]).stdout.is_empty());
    assert!(complaint(&["kept", "--at", &at, "--release", "vm-7"]).contains("'vm-7'"));
    assert!(complaint(&["keep", "--listen", &at]).contains(&at));
    keeper.signal("-USR1");
    assert_eq!(keeper.line(), "keeping 0 VMs");
    keeper.end();
    assert!(!socket.exists());
    assert!(complaint(&["kept", "--at", &at]).contains("kdp keep"));
}

#[test]
fn failures_are_one_line_that_names_the_value_and_the_next_step() {
    let (_dir, dir) = folder();
    let odd = dir.join("odd");
    fs::write(&odd, [1; 4097]).unwrap();
    let serve = |file: &str| complaint(&["serve", "--listen", "127.0.0.1:0", file]);
    assert!(serve("/does/not/exist").contains("/does/not/exist: No such file"));
    assert!(serve(&text(&odd)).contains("4097 bytes"));
    assert!(serve(&format!("{}@100", text(&odd))).contains("offset 100"));
    let taken = complaint(&["serve", "--listen", "unix:/does/not/exist/socket", KDP]);
    assert!(
        taken.contains("unix:/does/not/exist/socket") || taken.contains("multiples of 4096"),
        "{taken}"
    );

    fs::write(&odd, [1; 4096]).unwrap();
    let source = format!("file:{}", text(&odd));
    let handle = |more: &[&str]| complaint(&[&["handle", "--source", &source], more].concat());
    assert!(handle(&["--fd", "77"]).contains("file descriptor 77"));
    assert!(handle(&["--from-keeper", "unix:/does/not/exist"]).contains("/does/not/exist"));
    if !Path::new("/dev/kvm-demand-paging").exists() {
        assert!(handle(&["--create", "ram", "--size", "1M", "--shmem"]).contains("kdp doctor"));
    }
    let gone = dir.join("gone");
    let unreachable = complaint(&[
        "handle",
        "--source",
        &format!("unix:{}", text(&gone)),
        "--fd",
        "0",
    ]);
    assert!(unreachable.contains("file descriptor 0"), "{unreachable}");

    let own = std::process::id().to_string();
    assert!(complaint(&["list", "--pid", &own]).contains("has no VM open"));
    assert!(complaint(&["heal", "--pid", &own, "--fd", "1", "7"]).contains("descriptor 1"));
    assert!(complaint(&["poison", "--pid", "4000000000", "7"]).contains("4000000000"));

    let wrong = kdp(&["poison", "--pid", "1", "7+0"]);
    assert_eq!(wrong.status.code(), Some(2));
    let wrong = kdp(&["handle", "--source", "nonsense"]);
    assert_eq!(wrong.status.code(), Some(2));
}

#[test]
fn stat_reads_what_the_module_prints() {
    let (_dir, dir) = folder();
    fs::create_dir_all(dir.join("5/fdinfo")).unwrap();
    fs::write(
        dir.join("5/fdinfo/3"),
        "pos:\t0\nkdp-memslots:\t2\nkdp-faults:\t7\n",
    )
    .unwrap();
    fs::write(dir.join("5/comm"), "vmm\n").unwrap();
    let proc = text(&dir);
    let table = String::from_utf8(kdp(&["stat", "--proc", &proc]).stdout).unwrap();
    assert!(
        table.contains("PID  COMMAND  FD  MEMSLOTS  FAULTS\n  5    vmm      3   2         7\n"),
        "{table}"
    );
    let json = kdp(&["stat", "--proc", &proc, "--json", "5"]).stdout;
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["vms"][0]["values"]["faults"], 7);
    assert!(complaint(&["stat", "--proc", &proc, "6"]).contains("process 6"));
}

#[test]
fn every_command_has_a_man_page() {
    let (_dir, dir) = folder();
    let man = dir.join("man");
    assert!(kdp(&["man", &text(&man)]).status.success());
    for name in [
        "kdp",
        "kdp-serve",
        "kdp-handle",
        "kdp-keep",
        "kdp-kept",
        "kdp-stat",
        "kdp-poison",
        "kdp-heal",
        "kdp-list",
        "kdp-doctor",
    ] {
        let page = fs::read_to_string(man.join(format!("{name}.1"))).unwrap();
        assert!(page.contains(".SH SYNOPSIS"), "{name}");
    }
    assert!(!man.join("kdp-man.1").exists());
}

#[test]
fn every_visible_command_is_completed() {
    let (_dir, dir) = folder();
    assert!(kdp(&["completions", &text(&dir)]).status.success());
    for name in ["kdp.bash", "_kdp", "kdp.fish"] {
        let script = fs::read_to_string(dir.join(name)).unwrap();
        for shown in ["doctor", "handle", "bandwidth"] {
            assert!(script.contains(shown), "{name} lacks {shown}");
        }
        for hidden in ["completions", "--root", "-l root"] {
            assert!(!script.contains(hidden), "{name} has {hidden}");
        }
    }
}

#[test]
fn the_version_is_that_of_the_workspace() {
    let output = kdp(&["--version"]);
    let version = concat!("kdp ", env!("CARGO_PKG_VERSION"), "\n");
    assert_eq!(String::from_utf8(output.stdout).unwrap(), version);
}
