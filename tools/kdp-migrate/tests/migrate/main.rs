//! Migrations of a guest made of threads, over real sockets: whole ones, and ones that break.
//!
//! KDP_SOAK=N repeats the ones that break N times as often.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

mod guest;
mod peer;
mod proxy;
mod replace;
mod script;
mod vm;

use guest::PAGE;
use kdp_migrate::{
    rounds::Rule, wire, wire::Had, wire::Message, wire::Stage, Destination, DestinationFigures,
    DestinationMachine, DestinationOptions, DestinationReport, Error, Failure, Guest, MigrationId,
    Source, SourceOptions, SourceReport,
};
use kvm_demand_paging::PageRange;
use peer::{Heard, Peer};
use proxy::Proxy;
use std::{
    net::{SocketAddr, TcpListener},
    sync::{atomic::Ordering::SeqCst, Arc},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use vm::{Arriving, DestinationVm, Leaving, SourceVm, LOST, PAGES};

fn soak() -> u64 {
    let times = std::env::var("KDP_SOAK").ok();
    times.and_then(|times| times.parse().ok()).unwrap_or(1)
}

/// Short ones, since the failures are wanted; a busy machine must still keep to them.
fn source_options() -> SourceOptions {
    SourceOptions {
        rounds: Rule {
            max_rounds: 3,
            ..Rule::default()
        },
        hint_lead: Duration::from_millis(20),
        stall: Duration::from_secs(3),
        give_up: Duration::from_secs(20),
        ..SourceOptions::default()
    }
}

fn destination_options() -> DestinationOptions {
    DestinationOptions {
        stall: Duration::from_secs(3),
        answer: Duration::from_secs(3),
        give_up: Duration::from_secs(20),
        ..DestinationOptions::default()
    }
}

/// A destination that listens.
struct There {
    vm: Arc<DestinationVm>,
    address: SocketAddr,
    run: JoinHandle<Result<DestinationReport, Error>>,
}

fn there(options: DestinationOptions) -> There {
    let vm = DestinationVm::new();
    let destination = Destination::new(Arriving(vm.clone()), vm.misses(), options);
    listen(vm, destination)
}

fn listen<M>(vm: Arc<DestinationVm>, destination: Destination<M>) -> There
where
    M: DestinationMachine + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let run = thread::spawn(move || destination.run(&listener, &mut |_| {}));
    There { vm, address, run }
}

type Leave = JoinHandle<Result<SourceReport, Failure>>;

fn leave(vm: &Arc<SourceVm>, options: SourceOptions, address: String) -> Leave {
    let source = Source::new(Leaving(vm.clone()), options);
    thread::spawn(move || source.run(&address, &mut |_| {}))
}

fn wait_for(what: &str, mut come: impl FnMut() -> bool) {
    let start = Instant::now();
    while !come() {
        assert!(
            start.elapsed() < Duration::from_secs(30),
            "{what} did not come"
        );
        thread::sleep(Duration::from_millis(2));
    }
}

/// The guest is over there, whole, and goes on; here it does not run.
fn check_moved(from: &SourceVm, to: &DestinationVm) {
    let steps = from.vcpus.steps();
    wait_for("the guest's work", || {
        let vcpus = to.vcpus.lock().unwrap();
        vcpus
            .as_ref()
            .is_some_and(|vcpus| vcpus.steps() > 100 || !vcpus.errors().is_empty())
    });
    let (errors, _) = to.off();
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(to.starts.load(SeqCst), 1);
    assert!(to.is_lost(LOST), "a lost page is to stay lost");
    assert_eq!(
        from.vcpus.steps(),
        steps,
        "the guest runs at the source, too"
    );
    assert_eq!(from.resumes.load(SeqCst), 0);
    assert!(!from.logging.load(SeqCst));
    from.off();
}

/// The guest is here, whole, and goes on.
fn check_stayed(from: &SourceVm, to: &There) {
    assert!(from.is_running(), "the guest does not run on");
    assert_eq!(
        to.vm.starts.load(SeqCst),
        0,
        "the guest runs at the destination"
    );
    assert!(!from.logging.load(SeqCst));
    let errors = from.off();
    assert!(errors.is_empty(), "{errors:?}");
}

/// What a destination tells the source at the end.
fn figures(report: &DestinationReport) -> DestinationFigures {
    DestinationFigures {
        faults: report.faults,
        fault_p50_us: report.fault_p50_us,
        fault_p99_us: report.fault_p99_us,
        fault_max_us: report.fault_max_us,
        pages_too_late: report.pages_too_late,
        postcopy_ms: report.postcopy_ms,
    }
}

fn whole(options: SourceOptions, hints: bool, seed: u64) -> (SourceReport, DestinationReport) {
    let (from, to) = (SourceVm::boot(seed, hints), there(destination_options()));
    let sent = leave(&from, options, to.address.to_string())
        .join()
        .unwrap()
        .unwrap();
    wait_for("the destination's end", || to.run.is_finished());
    check_moved(&from, &to.vm);
    let came = to.run.join().unwrap().unwrap();
    println!(
        "{}\n{}",
        serde_json::to_string(&sent).unwrap(),
        serde_json::to_string(&came).unwrap()
    );
    assert_eq!(sent.id, came.id);
    assert_eq!(sent.reconnects + came.reconnects, 0);
    assert_eq!(sent.sent, came.received);
    assert_eq!(sent.pages_hinted_free, came.pages_hinted_free);
    assert_eq!(sent.destination, figures(&came));
    assert!(sent.downtime_ms > 0.0 && sent.total_ms >= sent.downtime_ms);
    assert!(came.faults > 0 && came.fault_p99_us >= came.fault_p50_us);
    assert!(came.postcopy_ms > 0.0 && came.total_ms >= came.postcopy_ms);
    (sent, came)
}

#[test]
fn precopy_then_postcopy_moves_a_busy_guest() {
    for seed in 0..2 * soak() {
        let (sent, _) = whole(source_options(), false, seed);
        assert!(sent.sent.precopy >= PAGES && sent.sent.lost >= 1);
        assert!(sent.precopy_ended.is_some());
    }
}

#[test]
fn postcopy_alone_sends_every_page_once() {
    for seed in 0..2 * soak() {
        let options = SourceOptions {
            rounds: Rule {
                max_rounds: 0,
                ..Rule::default()
            },
            // Slow, so that the guest waits for its pages.
            bandwidth: Some(2 << 20),
            ..source_options()
        };
        let (sent, came) = whole(options, false, seed);
        assert_eq!(sent.sent.precopy, 0);
        assert_eq!(
            sent.sent.requested + sent.sent.background,
            PAGES,
            "{sent:?}"
        );
        assert_eq!((sent.sent.lost, came.pages_too_late), (1, 0));
        assert!(sent.sent.requested > 0, "nobody asked for a page");
    }
}

#[test]
fn hints_save_pages_and_lose_none() {
    for seed in 0..3 * soak() {
        for max_rounds in [0, 10] {
            let options = SourceOptions {
                // Many rounds, so that hints of one come in another.
                rounds: Rule {
                    max_rounds,
                    downtime: Duration::ZERO,
                    patience: max_rounds,
                    ..Rule::default()
                },
                hint_lead: Duration::from_millis(100),
                ..source_options()
            };
            let (sent, _) = whole(options, true, seed);
            assert!(sent.hints_counted > 0 && sent.pages_hinted_free > 0);
            if max_rounds == 0 {
                let travelled = sent.sent.requested + sent.sent.background;
                assert_eq!(travelled + sent.pages_hinted_free, PAGES, "{sent:?}");
            }
        }
    }
}

#[test]
fn a_cut_connection_costs_time_not_data() {
    for seed in 0..4 * soak() {
        let (from, to) = (SourceVm::boot(seed, true), there(destination_options()));
        let mut random = seed;
        let cuts = (0..6)
            .map(|_| {
                random = guest::next(random);
                (random % 900_000) as i64 + 100
            })
            .collect();
        let proxy = Proxy::new(to.address, cuts);
        let sent = leave(&from, source_options(), proxy.address.clone())
            .join()
            .unwrap()
            .unwrap();
        wait_for("the destination's end", || to.run.is_finished());
        check_moved(&from, &to.vm);
        let came = to.run.join().unwrap().unwrap();
        assert!(
            sent.reconnects > 0 && came.reconnects > 0,
            "nothing was cut"
        );
        assert_eq!(sent.destination, figures(&came));
        println!("{seed}: {} reconnects", sent.reconnects);
    }
}

#[test]
fn a_source_killed_before_the_switch_leaves_no_guest_behind() {
    for seed in 0..2 * soak() {
        let options = DestinationOptions {
            give_up: Duration::from_millis(300),
            ..destination_options()
        };
        let (from, to) = (SourceVm::boot(seed, false), there(options));
        let proxy = Proxy::new(to.address, Vec::new());
        let options = SourceOptions {
            bandwidth: Some(1 << 20),
            give_up: Duration::from_millis(300),
            ..source_options()
        };
        let run = leave(&from, options, proxy.address.clone());
        wait_for("a page", || {
            to.vm.placed.lock().unwrap().iter().any(|times| *times > 0)
        });
        proxy.kill();
        wait_for("the destination's end", || to.run.is_finished());
        let failure = run.join().unwrap().unwrap_err();
        assert_eq!(failure.guest, Guest::RunsHere, "{failure}");
        check_stayed(&from, &to);
        assert!(matches!(to.run.join().unwrap(), Err(Error::Lost { .. })));
    }
}

#[test]
fn a_source_killed_after_the_switch_fails_closed() {
    for seed in 0..2 * soak() {
        let options = DestinationOptions {
            give_up: Duration::from_millis(300),
            ..destination_options()
        };
        let (from, to) = (SourceVm::boot(seed, false), there(options));
        let proxy = Proxy::new(to.address, Vec::new());
        let options = SourceOptions {
            rounds: Rule {
                max_rounds: 0,
                ..Rule::default()
            },
            bandwidth: Some(256 << 10),
            give_up: Duration::from_millis(300),
            ..source_options()
        };
        let run = leave(&from, options, proxy.address.clone());
        wait_for("the switch", || to.vm.starts.load(SeqCst) == 1);
        proxy.kill();
        let failure = run.join().unwrap().unwrap_err();
        assert_eq!(failure.guest, Guest::HandedOver, "{failure}");
        assert!(!from.is_running(), "the guest runs twice");
        assert_eq!(from.resumes.load(SeqCst), 0);
        assert!(matches!(
            to.run.join().unwrap(),
            Err(Error::Lost { .. } | Error::NeverCame { .. })
        ));
        // vCPUs stop with an error that says why, and none has read anything wrong.
        let vcpus = to.vm.vcpus.lock().unwrap().clone().unwrap();
        wait_for("the vCPUs' end", || vcpus.errors().len() == 2);
        for error in vcpus.errors() {
            assert!(error.contains("will never come"), "{error}");
        }
        from.off();
    }
}

#[test]
fn a_destination_killed_before_the_switch_leaves_the_guest_running() {
    for seed in 0..2 * soak() {
        let (from, to) = (SourceVm::boot(seed, true), there(destination_options()));
        let proxy = Proxy::new(to.address, Vec::new());
        let options = SourceOptions {
            bandwidth: Some(512 << 10),
            give_up: Duration::from_millis(300),
            ..source_options()
        };
        let run = leave(&from, options, proxy.address.clone());
        // 2 MiB less hinted pages take longer than that.
        thread::sleep(Duration::from_millis(100 * (seed % 4)));
        proxy.kill();
        let failure = run.join().unwrap().unwrap_err();
        assert_eq!(failure.guest, Guest::RunsHere, "{failure}");
        assert!(failure.to_string().contains("runs on here"), "{failure}");
        check_stayed(&from, &to);
    }
}

/// It took the state, and does not get ready: the guest is stopped, and must run again.
#[test]
fn a_destination_that_hangs_at_the_switch_gives_the_guest_back() {
    let from = SourceVm::boot(1, false);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let options = SourceOptions {
        rounds: Rule {
            max_rounds: 0,
            ..Rule::default()
        },
        switch_timeout: Duration::from_millis(300),
        id: Some(MigrationId([7; 16])),
        ..source_options()
    };
    let run = leave(&from, options, address);
    let (mut stream, _) = listener.accept().unwrap();
    let mut welcome = Vec::new();
    wire::encode(
        &Message::Welcome {
            id: MigrationId([7; 16]),
            stage: Stage::Copying,
            had: Had::Frames(0),
        },
        0,
        &mut welcome,
    );
    std::io::Write::write_all(&mut stream, &welcome).unwrap();
    let failure = run.join().unwrap().unwrap_err();
    assert_eq!(failure.guest, Guest::RunsHere, "{failure}");
    assert_eq!((from.stops.load(SeqCst), from.resumes.load(SeqCst)), (1, 1));
    assert!(from.is_running());
    assert!(from.off().is_empty());
}

#[test]
fn a_destination_of_another_release_is_refused_at_once() {
    let from = SourceVm::boot(1, false);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let id = MigrationId([7; 16]);
    let options = SourceOptions {
        id: Some(id),
        ..source_options()
    };
    let run = leave(&from, options, address);
    let (mut stream, _) = listener.accept().unwrap();
    let welcome = Message::Welcome {
        id,
        stage: Stage::Copying,
        had: Had::Frames(0),
    };
    let bytes = peer::of_version(&welcome, wire::VERSION + 1);
    std::io::Write::write_all(&mut stream, &bytes).unwrap();
    let failure = run.join().unwrap().unwrap_err();
    assert_eq!(failure.guest, Guest::RunsHere, "{failure}");
    assert!(
        matches!(failure.error, Error::Version { .. }),
        "{}",
        failure.error
    );
    assert!(from.is_running());
    assert!(from.off().is_empty());
}

#[test]
fn a_wrong_peer_is_refused_and_the_right_one_still_comes() {
    let right = MigrationId([1; 16]);
    let to = there(DestinationOptions {
        id: Some(right),
        ..destination_options()
    });
    let (_, heard) = Peer::greet(to.address, MigrationId([2; 16]), false);
    assert_eq!(heard, Heard::Error(4));
    let (_, heard) = Peer::greet(to.address, right, true);
    assert_eq!(heard, Heard::Error(4), "nothing was begun that could go on");
    for version in [wire::VERSION - 1, wire::VERSION + 1] {
        let mut peer = Peer::connect(to.address);
        let hello = Message::Hello {
            id: right,
            resume: false,
            layout: vm::layout(12),
        };
        peer.bytes(&peer::of_version(&hello, version));
        assert_eq!(peer.hear(), Heard::Error(1));
    }
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 5000], &[0; 100]] {
        let mut peer = Peer::connect(to.address);
        peer.bytes(garbage);
        assert!(matches!(peer.hear(), Heard::Error(_) | Heard::Closed));
    }
    let from = SourceVm::boot(1, false);
    let options = SourceOptions {
        id: Some(right),
        ..source_options()
    };
    leave(&from, options, to.address.to_string())
        .join()
        .unwrap()
        .unwrap();
    wait_for("the destination's end", || to.run.is_finished());
    check_moved(&from, &to.vm);
}

/// A destination in post-copy, whose source is the test.
fn in_postcopy(options: DestinationOptions) -> (There, Peer, MigrationId) {
    let to = there(options);
    let id = MigrationId::random();
    let (mut peer, heard) = Peer::greet(to.address, id, false);
    assert_eq!(heard, Heard::Welcome(Stage::Copying, Had::Frames(0)));
    peer.switch();
    (to, peer, id)
}

fn toucher(vm: &Arc<DestinationVm>, page: u64) -> JoinHandle<Result<u8, String>> {
    let vm = vm.clone();
    thread::spawn(move || vm.touch(page, |bytes| bytes[100]))
}

/// What is heard that is no request: one that was made before the other side knew of the end may come first.
fn hear_end(peer: &mut Peer) -> Heard {
    loop {
        match peer.hear() {
            Heard::Request(_) => {}
            other => return other,
        }
    }
}

fn hear_request(peer: &mut Peer, page: u64) {
    loop {
        match peer.hear() {
            Heard::Request(ranges) if ranges.iter().any(|range| range.contains(page)) => return,
            Heard::Request(_) => {}
            heard => panic!("{heard:?} instead of a request for page {page}"),
        }
    }
}

#[test]
fn a_page_that_is_wrong_is_asked_for_again() {
    for _ in 0..soak() {
        let (to, mut peer, id) = in_postcopy(destination_options());
        let reader = toucher(&to.vm, 33);
        hear_request(&mut peer, 33);
        // Bytes that do not belong to the checksum.
        let mut bytes = peer.frame(&Message::Pages {
            pages: PageRange::page(33),
            reason: wire::Reason::Requested,
            data: wire::Data::Bytes(&[5; PAGE]),
        });
        bytes[500] ^= 1;
        peer.bytes(&bytes);
        assert_eq!(hear_end(&mut peer), Heard::Closed);
        // A page that there is not.
        let (mut peer, heard) = Peer::greet(to.address, id, true);
        assert!(
            matches!(heard, Heard::Welcome(Stage::Running, Had::Frames(1..))),
            "{heard:?}"
        );
        assert_eq!(peer.hear(), Heard::Started);
        hear_request(&mut peer, 33);
        peer.page(PAGES, &[5; PAGE]);
        let heard = hear_end(&mut peer);
        assert!(
            matches!(heard, Heard::Error(2) | Heard::Closed),
            "{heard:?}"
        );
        // Another page than the one that was asked for: it is still asked for.
        let (mut peer, _) = Peer::greet(to.address, id, true);
        assert_eq!(peer.hear(), Heard::Started);
        hear_request(&mut peer, 33);
        peer.page(34, &[6; PAGE]);
        peer.page(33, &[7; PAGE]);
        assert_eq!(reader.join().unwrap(), Ok(7));
        assert_eq!(to.vm.touch(34, |bytes| bytes[100]), Ok(6));
        assert_eq!(to.vm.placed.lock().unwrap()[33], 1);
    }
}

/// Who counted it, or did not, would lose count of what is there: a page that got stale would stay so.
#[test]
fn a_frame_that_is_lost_or_comes_twice_ends_its_connection() {
    let to = there(destination_options());
    let id = MigrationId::random();
    let (mut peer, heard) = Peer::greet(to.address, id, false);
    assert_eq!(heard, Heard::Welcome(Stage::Copying, Had::Frames(0)));
    let message = Message::Pages {
        pages: PageRange::page(33),
        reason: wire::Reason::PreCopy,
        data: wire::Data::Bytes(&[5; PAGE]),
    };
    for twice in [true, false] {
        let frame = peer.frame(&message);
        if twice {
            peer.bytes(&frame);
            peer.bytes(&frame);
        } else {
            // The frame is not sent, and the next one is.
            peer.send(&message);
        }
        let heard = hear_end(&mut peer);
        assert!(
            matches!(heard, Heard::Error(2) | Heard::Closed),
            "{heard:?}"
        );
        let heard;
        (peer, heard) = Peer::greet(to.address, id, true);
        assert_eq!(heard, Heard::Welcome(Stage::Copying, Had::Frames(1)));
    }
}

#[test]
fn a_page_that_comes_twice_is_placed_once() {
    for _ in 0..soak() {
        let (to, mut peer, _) = in_postcopy(destination_options());
        let reader = toucher(&to.vm, 40);
        hear_request(&mut peer, 40);
        peer.page(40, &[1; PAGE]);
        assert_eq!(reader.join().unwrap(), Ok(1));
        to.vm.touch(40, |bytes| bytes[100] = 2).unwrap();
        // Requested, and then in the background; with neighbours, too.
        peer.page(40, &[3; PAGE]);
        peer.send(&Message::Pages {
            pages: PageRange::new(39, 3),
            reason: wire::Reason::Background,
            data: wire::Data::Bytes(&[4; 3 * PAGE]),
        });
        assert_eq!(to.vm.touch(41, |bytes| bytes[100]), Ok(4));
        assert_eq!(to.vm.touch(40, |bytes| bytes[100]), Ok(2));
        assert_eq!(to.vm.placed.lock().unwrap()[39..42], [1, 1, 1]);
    }
}

#[test]
fn a_page_that_never_comes_is_told_to_who_waits() {
    for _ in 0..soak() {
        let options = DestinationOptions {
            answer: Duration::from_millis(200),
            give_up: Duration::from_millis(900),
            ..destination_options()
        };
        let (to, mut peer, id) = in_postcopy(options);
        let reader = toucher(&to.vm, 50);
        let mut asked = 0;
        // It is there, and answers everything but that.
        while !to.run.is_finished() {
            match peer.hear() {
                Heard::Request(ranges) => {
                    asked += u32::from(ranges.iter().any(|range| range.contains(50)));
                }
                Heard::Closed => match Peer::try_connect(to.address) {
                    Ok(again) => {
                        peer = again;
                        peer.hello(id, true);
                    }
                    Err(_) => break,
                },
                _ => {}
            }
        }
        assert!(asked > 1, "it was asked for {asked} times");
        let error = reader.join().unwrap().unwrap_err();
        assert!(error.contains("page 50 was asked for"), "{error}");
        assert!(matches!(
            to.run.join().unwrap(),
            Err(Error::NeverCame { .. })
        ));
    }
}

/// The source says that it has sent all, and answers with another page: nobody touches the one that is missing, and the
/// migration must not wait for it for ever.
#[test]
fn the_rest_is_asked_for_until_it_comes() {
    let options = DestinationOptions {
        // Even on a loaded machine, all pages but one are sent within this time.
        answer: Duration::from_secs(3),
        ..destination_options()
    };
    let (to, mut peer, id) = in_postcopy(options);
    (1..PAGES)
        .filter(|page| *page != 50)
        .for_each(|page| peer.page(page, &[0; PAGE]));
    peer.send(&Message::AllSent);
    hear_request(&mut peer, 50);
    peer.page(51, &[0; PAGE]);
    assert_eq!(hear_end(&mut peer), Heard::Closed);
    let (mut peer, _) = Peer::greet(to.address, id, true);
    assert_eq!(peer.hear(), Heard::Started);
    hear_request(&mut peer, 50);
    peer.page(50, &[0; PAGE]);
    assert_eq!(peer.hear(), Heard::Done);
    peer.send(&Message::Bye);
    to.run.join().unwrap().unwrap();
}

#[test]
fn all_sent_and_not_all_here_is_asked_for() {
    let (to, mut peer, _) = in_postcopy(destination_options());
    peer.send(&Message::AllSent);
    loop {
        match peer.hear() {
            Heard::Request(ranges) => ranges
                .iter()
                .flat_map(PageRange::iter)
                .for_each(|page| peer.page(page, &[0; PAGE])),
            heard => {
                assert_eq!(heard, Heard::Done);
                break;
            }
        }
    }
    peer.send(&Message::Bye);
    let report = to.run.join().unwrap().unwrap();
    assert_eq!(report.pages, PAGES);
}
