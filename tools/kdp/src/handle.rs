//! `kdp handle`.

use crate::{
    cli::HandleArgs,
    failure::{Context, Failure},
    memory,
    ready::Ready,
    signals,
    units::human,
};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kvm_demand_paging::{
    handler::{Config, Handler, Report},
    keeper::{self, Until},
    receive_vm,
    source::{bind_unix, Options},
    Memslot, Vm, PAGE_SIZE,
};
use rustix::{
    event::{poll, PollFd, PollFlags},
    fd::{FromRawFd, OwnedFd},
    net::sockopt::socket_peercred,
    process::{pidfd_open, Pid, PidfdFlags},
};
use std::{
    collections::BTreeMap,
    fs,
    io::IsTerminal,
    path::Path,
    sync::{
        mpsc::{self, RecvTimeoutError},
        Arc,
    },
    thread,
    time::{Duration, Instant},
};

const PAGE: u64 = PAGE_SIZE as u64;

/// How often the progress is drawn.
const DRAW: Duration = Duration::from_millis(200);

/// A VM, with what must live as long as it is handled, and the process that it ends with.
struct Subject {
    vm: Vm,
    /// Without it, the memslot that was made here would be held by nobody but who opens its path.
    _memslot: Option<Memslot>,
    owner: Option<Pid>,
    ready: Option<Ready>,
}

pub fn run(args: &HandleArgs) -> Result<(), Failure> {
    // Before this process opens anything of its own: the number must not be one of ours.
    let inherited = args.fd.map(inherited).transpose()?;
    let options = Options::default();
    // Before the VM, so that nobody waits for a handler that has no source.
    let faults = args.source.open(&options)?;
    let background = match args.background {
        true => Some(args.source.open(&options)?),
        false => None,
    };
    let Subject {
        vm,
        _memslot,
        owner,
        ready,
    } = subject(args, inherited)?;
    if let Some(socket) = &args.keeper {
        keeper::give(socket, &args.vm, &vm, Until::Released)?;
    }
    let layout: BTreeMap<u32, u64> = match args.create {
        Some(_) => BTreeMap::from([(0, args.offset / PAGE)]),
        None => args
            .slot
            .iter()
            .map(|(slot, offset)| (*slot, offset / PAGE))
            .collect(),
    };
    let config = Config {
        layout,
        bandwidth: args.bandwidth,
    };
    let handler = Arc::new(Handler::new(vm, faults, background, config)?);

    let (stop, tell) = (Arc::clone(&handler), Arc::clone(&handler));
    let told = args.json.clone();
    signals::watch(
        move || stop.stop(),
        move || show(&tell.report(), told.as_deref()),
    )?;
    for pid in args
        .until_pid
        .and_then(Pid::from_raw)
        .into_iter()
        .chain(owner)
    {
        stop_after(pid, Arc::clone(&handler))?;
    }
    let (end, ended) = mpsc::channel();
    let watched = Arc::clone(&handler);
    let (every, json) = (args.report.map(Duration::from_secs), args.json.clone());
    let reporter = thread::spawn(move || report_until(&ended, &watched, every, json.as_deref()));
    let ready = match ready {
        Some(ready) => ready,
        None => Ready::tell(args.ready_file.as_ref())?,
    };

    let result = handler.run();
    drop((ready, end));
    // It holds nothing but the handler; a panic of it must not hide how the handler ended.
    let _ = reporter.join();
    let report = handler.report();
    print(&report);
    if let Some(path) = &args.json {
        write_json(path, &report)?;
    }
    Ok(result?)
}

/// Get the VM in the way that was asked for.
fn subject(args: &HandleArgs, inherited: Option<Vm>) -> Result<Subject, Failure> {
    let plain = |vm| Subject {
        vm,
        _memslot: None,
        owner: None,
        ready: None,
    };
    if let Some(path) = &args.listen_fd {
        return handed_over(path, args);
    }
    if let Some(vm) = inherited {
        return Ok(plain(vm));
    }
    if let Some(path) = &args.from_keeper {
        return Ok(plain(keeper::take(path, &args.vm)?));
    }
    // clap asks for one of the four, and for what --create needs.
    let (Some(name), Some(size)) = (&args.create, args.size) else {
        return Err(Failure::Other(
            "no VM: give --listen-fd, --fd, --create or --from-keeper".to_owned(),
        ));
    };
    if args.offset % PAGE != 0 {
        return Err(Failure::Other(format!(
            "the offset {} is not a multiple of {PAGE} bytes",
            args.offset
        )));
    }
    let vm = Vm::open()?;
    let memfd = memory::create(&vm, name, args.hugetlb, args.shmem_huge, size)?;
    let memslot = vm
        .create_memslot(0, &memfd)
        .poison_signals(true)
        .name(name)
        .paging(true)
        .create()?;
    tracing::info!(
        "{} is there: {}",
        Memslot::path(name).display(),
        human(size)
    );
    Ok(Subject {
        _memslot: Some(memslot),
        ..plain(vm)
    })
}

/// Time for a client of the socket to hand its VM over.
const HAND_OVER: Duration = Duration::from_secs(10);

/// Wait until the VMM hands its VM over.
fn handed_over(path: &Path, args: &HandleArgs) -> Result<Subject, Failure> {
    let listener = bind_unix(path).on(format_args!("cannot listen at unix:{}", path.display()))?;
    let ready = Ready::tell(args.ready_file.as_ref())?;
    let result = loop {
        let (stream, _) = listener.accept().on(path.display())?;
        // A client that says nothing must not keep the VMM waiting.
        stream.set_read_timeout(Some(HAND_OVER)).on("SO_RCVTIMEO")?;
        match receive_vm(&stream) {
            Ok((vm, name)) => {
                tracing::info!("the VM '{name}' was handed over");
                let owner = socket_peercred(&stream).on("SO_PEERCRED")?.pid;
                break Subject {
                    vm,
                    _memslot: None,
                    owner: Some(owner),
                    ready: Some(ready),
                };
            }
            // The next one may do better.
            Err(error) => tracing::warn!("no VM was handed over: {error}"),
        }
    };
    // Somebody may have removed it.
    let _ = fs::remove_file(path);
    Ok(result)
}

fn inherited(fd: u32) -> Result<Vm, Failure> {
    let is_open = Path::new("/proc/self/fd").join(fd.to_string()).exists();
    let fd = i32::try_from(fd).ok().filter(|fd| is_open && *fd > 2).ok_or_else(|| {
        Failure::Other(format!(
            "no file descriptor {fd} was inherited: it must be above 2 and open, without O_CLOEXEC, when kdp is started"
        ))
    })?;
    // SAFETY: whoever started this process passed it on for this use, and nothing in this process owns it:
    // this is called before anything here is opened, and once.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(Vm::from_fd(fd)?)
}

/// Stop the handler when a process has ended.
fn stop_after(pid: Pid, handler: Arc<Handler>) -> Result<(), Failure> {
    let pidfd = pidfd_open(pid, PidfdFlags::empty())
        .on(format_args!("process {pid}", pid = pid.as_raw_nonzero()))?;
    thread::spawn(move || {
        while poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None).is_err() {}
        tracing::info!("process {} has ended", pid.as_raw_nonzero());
        handler.stop();
    });
    Ok(())
}

/// Draw the progress, and report every so often, until `ended` is closed.
fn report_until(
    ended: &mpsc::Receiver<()>,
    handler: &Handler,
    every: Option<Duration>,
    json: Option<&Path>,
) {
    let target = match std::io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    };
    let bar = ProgressBar::with_draw_target(Some(0), target);
    if let Ok(style) = ProgressStyle::with_template("{elapsed} {bar:40} {pos}/{len} pages {msg}") {
        bar.set_style(style);
    }
    let mut last = Instant::now();
    while ended.recv_timeout(DRAW) == Err(RecvTimeoutError::Timeout) {
        if bar.is_hidden() && every.is_none() {
            continue;
        }
        let report = handler.report();
        bar.set_length(report.pages);
        bar.set_position(report.pages_present);
        bar.set_message(format!(
            "on demand {}, p99 {} us",
            report.pages_on_demand, report.fetch_p99_us
        ));
        if every.is_some_and(|every| last.elapsed() >= every) {
            last = Instant::now();
            bar.suspend(|| show(&report, json));
        }
    }
    bar.finish_and_clear();
}

/// Print a report, and write it to the file if there is one.
fn show(report: &Report, json: Option<&Path>) {
    print(report);
    if let Some(Err(failure)) = json.map(|path| write_json(path, report)) {
        tracing::warn!("{failure}");
    }
}

/// Replace the file by one with this report, at once.
fn write_json(path: &Path, report: &Report) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(report)
        .map_err(std::io::Error::from)
        .on("report")?;
    let mut part = path.to_owned().into_os_string();
    part.push(".part");
    fs::write(&part, text + "\n")
        .and_then(|()| fs::rename(&part, path))
        .on(format_args!("cannot write the report {}", path.display()))
}

fn print(report: &Report) {
    let touched = &report.touched;
    println!(
        "fetched {} of {} pages ({} on demand, {} in the background, unasked; {} of zeros, {} came too late, {} unreadable)",
        report.pages_fetched,
        report.pages,
        report.pages_on_demand,
        report.pages_in_background,
        report.pages_zero,
        report.pages_too_late,
        report.pages_failed
    );
    println!(
        "touched by GUEST {}, KERNEL {}, USER {}, vCPU exits {}, others {}; {} events, {} delivered again",
        touched.guest,
        touched.kernel,
        touched.user,
        touched.exit,
        touched.unknown,
        report.events,
        report.events_redelivered
    );
    let first = report
        .first_fault_ms
        .map_or_else(|| "none".to_owned(), |ms| format!("after {ms:.1} ms"));
    println!(
        "fetch latency p50 {} us, p99 {} us, longest {} us; first fault {first}; received {}, placed {}, {} reconnects, {:.1} s",
        report.fetch_p50_us,
        report.fetch_p99_us,
        report.fetch_max_us,
        human(report.bytes_received),
        human(report.bytes_placed),
        report.reconnects,
        report.elapsed_ms / 1000.0
    );
}
