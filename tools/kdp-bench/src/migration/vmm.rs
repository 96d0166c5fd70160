//! `kdp-vmm linux` as a process, with the time at which its guest tells of each round of its load.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use kdp_migrate::control::{receive, send, Command as Asked, Order, Reply, Status};
use kdp_migrate::SourceReport;
use kdp_vmm::backing_name;

use super::{failed, Case, MigrationArgs};
use crate::Error;

/// What anything here may take.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// What a guest has said.
#[derive(Clone, Default)]
pub struct Console(Arc<Mutex<Said>>);

#[derive(Default)]
struct Said {
    rounds: Vec<Instant>,
    /// What it has complained of.
    bad: Option<String>,
}

impl Console {
    fn lock(&self) -> MutexGuard<'_, Said> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A line of it.
    pub fn line(&self, line: &str) {
        let now = Instant::now();
        let mut said = self.lock();
        if line.starts_with("KDP-LOAD round ") {
            said.rounds.push(now);
        } else if ["KDP-LOAD BAD", "KDP-FAILED", "BUG:", "Oops"]
            .iter()
            .any(|bad| line.contains(bad))
        {
            said.bad.get_or_insert_with(|| line.to_owned());
        }
    }

    /// When it told of each round so far.
    pub fn rounds(&self) -> Result<Vec<Instant>, Error> {
        let said = self.lock();
        match &said.bad {
            Some(bad) => Err(failed(format!("the guest says: {bad}"))),
            None => Ok(said.rounds.clone()),
        }
    }

    /// Wait until what it has told of is enough.
    pub fn wait<T>(
        &self,
        what: &str,
        enough: impl Fn(&[Instant]) -> Option<T>,
    ) -> Result<T, Error> {
        until(what, || Ok(enough(&self.rounds()?)))
    }
}

/// Look until there is something.
fn until<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>, Error>) -> Result<T, Error> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() > deadline {
            return Err(failed(format!("{what}: not within {PATIENCE:?}")));
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// A VMM that waits for a guest, or has it.
pub struct Vmm {
    child: Child,
    control: PathBuf,
    pub console: Console,
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Both fail for one that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.control);
    }
}

impl Vmm {
    /// One that waits for a guest, in memory as this case has it.
    pub fn waiting(args: &MigrationArgs, case: &Case) -> Result<Self, Error> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("kdp-bench-{}-{number}", std::process::id());
        let control = std::env::temp_dir().join(name);
        let io = |source| Error::Io {
            what: format!("start {}", args.vmm.display()),
            source,
        };
        let mut child = Command::new(&args.vmm)
            .args(["linux", "--incoming", "127.0.0.1:0"])
            .args(["--pager", case.pager()])
            .args(["--backing", backing_name(case.backing)])
            .args(["--memory", &args.bytes().to_string()])
            .arg("--control")
            .arg(&control)
            .stdout(Stdio::piped())
            .spawn()
            .map_err(io)?;
        let console = Console::default();
        if let Some(out) = child.stdout.take() {
            let console = console.clone();
            thread::spawn(move || listen(out, &console));
        }
        let mut vmm = Self {
            child,
            control,
            console,
        };
        until("the VMM listens", || {
            if let Some(status) = vmm.child.try_wait().map_err(io)? {
                return Err(failed(format!("kdp-vmm ended with {status}")));
            }
            Ok(vmm.status().ok())
        })?;
        Ok(vmm)
    }

    fn ask(&self, command: &Asked) -> Result<Reply, Error> {
        let io = |source| Error::Io {
            what: "talk to kdp-vmm".to_owned(),
            source,
        };
        let stream = UnixStream::connect(&self.control).map_err(io)?;
        send(&stream, command).map_err(io)?;
        let mut replies = BufReader::new(&stream);
        loop {
            match receive(&mut replies).map_err(io)? {
                Some(Reply::Progress(_)) => {}
                Some(reply) => return Ok(reply),
                None => return Err(failed("kdp-vmm went away")),
            }
        }
    }

    fn status(&self) -> Result<Status, Error> {
        match self.ask(&Asked::Status)? {
            Reply::Status(status) => Ok(status),
            other => Err(failed(format!(
                "asked for its status kdp-vmm says {other:?}"
            ))),
        }
    }

    /// Where it waits for a guest.
    pub fn address(&self) -> Result<String, Error> {
        let listening = self.status()?.listening;
        listening.ok_or_else(|| failed("kdp-vmm waits for no guest"))
    }

    /// Wait until its guest has all of its memory there.
    pub fn wait_whole(&self) -> Result<(), Error> {
        until("the guest has arrived", || {
            Ok(self.status()?.arrival.map(drop))
        })
    }

    /// Move its guest, as `kdp migrate` does: what came of it, and when the guest had stopped.
    pub fn move_to(&self, order: Order) -> Result<(SourceReport, Instant), Error> {
        match self.ask(&Asked::Migrate(order))? {
            Reply::Moved(report) => {
                let since = Duration::from_secs_f64((report.total_ms - report.precopy_ms) / 1e3);
                let stopped = Instant::now().checked_sub(since);
                let stopped =
                    stopped.ok_or_else(|| failed("the machine's clock has just begun"))?;
                Ok((report, stopped))
            }
            other => Err(failed(format!("the guest was not moved: {other:?}"))),
        }
    }
}

/// Lines as they come. It may be cut within a character where the guest was moved.
fn listen(out: ChildStdout, console: &Console) {
    let mut out = BufReader::new(out);
    let mut line = Vec::new();
    while let Ok(1..) = out.read_until(b'\n', &mut line) {
        console.line(&String::from_utf8_lossy(&line));
        line.clear();
    }
}
