//! A server and its clients over real sockets, with a network between them that cuts, damages and stalls.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod network;

use kvm_demand_paging::{
    source::{Address, Client, Content, Control, Error, Options, PageFile, PageSource, Server},
    PageRange, PAGE_SIZE,
};
use network::{Network, Numbers, Trouble};
use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

const LONG: Duration = Duration::from_secs(30);

/// The first bytes of a page tell which it is; every third page is zeros.
fn contents(page: u64) -> Vec<u8> {
    let mut data = vec![0; PAGE_SIZE];
    if page % 3 != 0 {
        let mut numbers = Numbers(page + 1);
        data.iter_mut()
            .for_each(|byte| *byte = numbers.below(256) as u8);
        data[..8].copy_from_slice(&page.to_le_bytes());
    }
    data
}

fn snapshot(pages: u64) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    (0..pages).for_each(|page| file.write_all(&contents(page)).unwrap());
    file
}

struct Running {
    address: Address,
    control: Control,
    thread: Option<thread::JoinHandle<Result<(), Error>>>,
}

impl Running {
    fn start(address: &Address, file: &tempfile::NamedTempFile) -> Self {
        let server = Server::bind(address, PageFile::open(file.path(), 0).unwrap()).unwrap();
        Self {
            address: server.address().clone(),
            control: server.control(),
            thread: Some(thread::spawn(move || server.run())),
        }
    }

    fn tcp(file: &tempfile::NamedTempFile) -> Self {
        Self::start(&"127.0.0.1:0".parse().unwrap(), file)
    }

    fn host(&self) -> &str {
        match &self.address {
            Address::Tcp(host) => host,
            Address::Unix(_) => panic!("not TCP"),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.control.stop();
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

fn options() -> Options {
    Options {
        connect_timeout: Duration::from_secs(5),
        stall_timeout: Duration::from_millis(300),
        max_backoff: Duration::from_millis(50),
        give_up: None,
    }
}

/// Receive until nothing is wanted; how often each page came. All bytes are checked.
fn receive_all(client: &Client, wanted: u64) -> BTreeMap<u64, u32> {
    let mut came: BTreeMap<u64, u32> = BTreeMap::new();
    let start = Instant::now();
    while (came.len() as u64) < wanted {
        assert!(
            start.elapsed() < LONG,
            "{} of {wanted} pages came",
            came.len()
        );
        client
            .recv(Duration::from_millis(100), &mut |range, content| {
                for page in range.iter() {
                    *came.entry(page).or_default() += 1;
                    let at = (page - range.first) as usize * PAGE_SIZE;
                    match content {
                        Content::Data(data) => {
                            assert!(data[at..at + PAGE_SIZE] == contents(page), "page {page}")
                        }
                        Content::Zero => assert_eq!(page % 3, 0, "page {page}"),
                        Content::Failed(errno) => panic!("page {page}: errno {errno}"),
                    }
                }
            })
            .unwrap();
    }
    assert_eq!(client.outstanding(), 0);
    came
}

fn assert_once(came: &BTreeMap<u64, u32>, pages: u64) {
    assert_eq!(came.len() as u64, pages);
    assert!(came.values().all(|times| *times == 1));
}

#[test]
fn pages_come_once_over_tcp_and_unix_sockets_in_any_order() {
    let file = snapshot(300);
    let dir = tempfile::tempdir().unwrap();
    let unix = Address::Unix(dir.path().join("socket"));
    for server in [Running::tcp(&file), Running::start(&unix, &file)] {
        let client = Client::connect(server.address.clone(), options()).unwrap();
        assert_eq!(client.pages(), 300);
        client
            .request(&[PageRange::page(299), PageRange::new(0, 7)])
            .unwrap();
        client.request(&[PageRange::new(5, 294)]).unwrap();
        assert_once(&receive_all(&client, 300), 300);
        let counters = server.control.counters();
        assert_eq!(
            (counters.pages, counters.zero_pages, counters.clients),
            (300, 100, 1)
        );
        // No byte was sent for a page of zeros.
        assert!(counters.bytes < 210 * PAGE_SIZE as u64, "{counters:?}");
        // The client does not count the welcome: 12 bytes of header and 24 of payload.
        assert_eq!(client.counters().bytes + 36, counters.bytes);
    }
}

#[test]
fn several_clients_at_once() {
    let file = snapshot(100);
    let server = Running::tcp(&file);
    thread::scope(|scope| {
        for _ in 0..5 {
            scope.spawn(|| {
                let client = Client::connect(server.address.clone(), options()).unwrap();
                (0..100)
                    .rev()
                    .for_each(|page| client.request(&[PageRange::page(page)]).unwrap());
                assert_once(&receive_all(&client, 100), 100);
            });
        }
    });
    assert_eq!(server.control.counters().clients, 5);
}

fn survive(trouble: Trouble, seed: u64) {
    const PAGES: u64 = 400;
    let file = snapshot(PAGES);
    let server = Running::tcp(&file);
    // The first connection must be made: a source that is wrong from the start is an error.
    let network = Network::start(server.host().to_owned(), trouble, seed);
    network.calm.store(true, Ordering::Relaxed);
    let client = Client::connect(network.address.clone(), options()).unwrap();
    network.calm.store(false, Ordering::Relaxed);
    server.control.cut();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut numbers = Numbers(seed + 1);
            let mut first = 0;
            while first < PAGES {
                let count = (1 + numbers.below(20)).min(PAGES - first);
                client.request(&[PageRange::new(first, count)]).unwrap();
                first += count;
                thread::sleep(Duration::from_micros(numbers.below(2000)));
            }
        });
        assert_once(&receive_all(&client, PAGES), PAGES);
    });
    assert!(client.counters().reconnects > 0);
    assert!(network.troubles.load(Ordering::Relaxed) > 0);
}

#[test]
fn connections_that_are_cut_lose_nothing() {
    (1..=3).for_each(|seed| survive(Trouble::Cut, seed * 7919));
}

#[test]
fn bytes_that_are_damaged_are_never_taken_for_pages() {
    (1..=4).for_each(|seed| survive(Trouble::Damage, seed * 104_729));
}

#[test]
fn a_connection_that_stalls_is_replaced() {
    survive(Trouble::Stall, 31);
}

/// Send bytes to a server; all that it answers until it hangs up.
fn answer(server: &Running, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(server.host()).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    // It may hang up before it has read all.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

fn frame(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_le_bytes().to_vec();
    bytes.extend(kind.to_le_bytes());
    bytes.extend([0, 0]);
    let mut crc = crc32fast::Hasher::new();
    crc.update(&bytes);
    crc.update(payload);
    bytes.extend(crc.finalize().to_le_bytes());
    bytes.extend(payload);
    bytes
}

fn hello(version: u32) -> Vec<u8> {
    let mut payload = b"KDPPAGES".to_vec();
    payload.extend(version.to_le_bytes());
    payload.extend(4096u32.to_le_bytes());
    frame(1, &payload)
}

/// The code and the text of the error frame at the end of an answer.
fn error(answer: &[u8]) -> (u32, String) {
    let at = answer
        .windows(2)
        .rposition(|bytes| bytes == [5, 0])
        .expect("an error frame")
        - 4;
    let len = u32::from_le_bytes(answer[at..at + 4].try_into().unwrap()) as usize;
    let payload = &answer[at + 12..];
    assert_eq!(payload.len(), len);
    let code = u32::from_le_bytes(payload[..4].try_into().unwrap());
    (code, String::from_utf8(payload[4..].to_vec()).unwrap())
}

fn request(ranges: &[(u64, u64)]) -> Vec<u8> {
    let numbers = ranges.iter().flat_map(|(first, count)| [*first, *count]);
    frame(3, &numbers.flat_map(u64::to_le_bytes).collect::<Vec<u8>>())
}

#[test]
fn nonsense_is_answered_precisely_and_harms_nobody_else() {
    let file = snapshot(10);
    let server = Running::tcp(&file);
    let bystander = Client::connect(server.address.clone(), options()).unwrap();
    let after_hello = |bytes: Vec<u8>| [hello(1), bytes].concat();
    let mut damaged = request(&[(0, 1)]);
    damaged[13] ^= 1;
    let cases: [(Vec<u8>, u32, &str); 9] = [
        (hello(2), 1, "version 2"),
        (frame(1, b"KDPPAGES"), 2, "greeting"),
        (
            request(&[(0, 1)]),
            2,
            "Request is not what a client sends first",
        ),
        (
            after_hello(hello(1)),
            2,
            "Hello is not what a client sends now",
        ),
        (
            after_hello(request(&[(10, 1)])),
            2,
            "1 pages from page 10: the source has 10",
        ),
        (after_hello(request(&[(3, 0)])), 2, "0 pages"),
        (after_hello(frame(9, b"")), 2, "kind 9"),
        (after_hello(damaged), 3, "checksum"),
        (after_hello([0xff; 12].to_vec()), 2, "kind 65535"),
    ];
    for (bytes, code, text) in &cases {
        let (found, said) = error(&answer(&server, bytes));
        assert_eq!(found, *code, "{said}");
        assert!(said.contains(text), "'{said}' lacks '{text}'");
    }
    let mut huge = frame(3, b"");
    huge[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(error(&answer(&server, &after_hello(huge)))
        .1
        .contains("4294967295 bytes"));

    let mut numbers = Numbers(99);
    for _ in 0..100 {
        let mut bytes = if numbers.below(2) == 0 {
            hello(1)
        } else {
            Vec::new()
        };
        bytes.extend((0..numbers.below(300)).map(|_| numbers.below(256) as u8));
        answer(&server, &bytes);
    }
    bystander.request(&[PageRange::new(0, 10)]).unwrap();
    assert_once(&receive_all(&bystander, 10), 10);
    assert!(server.control.counters().refused >= 10);
}

#[test]
fn requests_outside_the_source_are_refused_before_they_are_sent() {
    let file = snapshot(10);
    let server = Running::tcp(&file);
    let client = Client::connect(server.address.clone(), options()).unwrap();
    for range in [
        PageRange::new(10, 1),
        PageRange::new(0, 11),
        PageRange::new(3, 0),
        PageRange::new(9, u64::MAX),
    ] {
        assert!(
            matches!(client.request(&[range]), Err(Error::Argument(_))),
            "{range:?}"
        );
    }
    assert_eq!(client.outstanding(), 0);
}

#[test]
fn pages_that_the_server_cannot_read_are_told_as_such() {
    let file = snapshot(4);
    let server = Running::tcp(&file);
    let client = Client::connect(server.address.clone(), options()).unwrap();
    file.as_file().set_len(2 * PAGE_SIZE as u64).unwrap();
    client.request(&[PageRange::new(0, 4)]).unwrap();
    let mut failed = Vec::new();
    let start = Instant::now();
    while client.outstanding() > 0 && start.elapsed() < LONG {
        let mut sink = |range: PageRange, content: Content<'_>| {
            if let Content::Failed(errno) = content {
                failed.push((range.first, range.count, errno != 0));
            }
        };
        client.recv(Duration::from_millis(100), &mut sink).unwrap();
    }
    assert_eq!(failed, [(2, 1, true), (3, 1, true)]);
    assert_eq!(server.control.counters().failed_pages, 2);
}

#[test]
fn a_server_that_comes_back_with_another_snapshot_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let address = Address::Unix(dir.path().join("socket"));
    let (one, other) = (snapshot(10), snapshot(11));
    let server = Running::start(&address, &one);
    let client = Client::connect(address.clone(), options()).unwrap();
    drop(server);
    let _server = Running::start(&address, &other);
    client.request(&[PageRange::page(1)]).unwrap();
    let error = client
        .recv(LONG, &mut |_, _| panic!("a page of another snapshot"))
        .unwrap_err();
    assert!(matches!(error, Error::Protocol { .. }), "{error}");
    assert!(error.to_string().contains("11 pages, it had 10"), "{error}");
}

#[test]
fn a_server_that_stays_away_is_given_up_if_so_wanted() {
    let file = snapshot(10);
    let server = Running::tcp(&file);
    let patient = Options {
        give_up: Some(Duration::from_millis(300)),
        ..options()
    };
    let client = Client::connect(server.address.clone(), patient.clone()).unwrap();
    let address = server.address.clone();
    drop(server);
    // Nobody needs it: that is no error.
    assert_eq!(
        client
            .recv(Duration::from_millis(500), &mut |_, _| ())
            .unwrap(),
        0
    );
    client.request(&[PageRange::page(1)]).unwrap();
    let error = client.recv(LONG, &mut |_, _| ()).unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");

    let start = Instant::now();
    let brief = Options {
        connect_timeout: Duration::from_millis(200),
        ..patient
    };
    let error = Client::connect(address.clone(), brief)
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains(&address.to_string()) && error.contains("kdp serve"),
        "{error}"
    );
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn stopping_ends_a_wait_and_a_search_for_the_server() {
    let file = snapshot(10);
    for gone in [false, true] {
        let server = Running::tcp(&file);
        let client = Client::connect(server.address.clone(), options()).unwrap();
        let mut server = Some(server);
        if gone {
            server = None;
            client.request(&[PageRange::page(1)]).unwrap();
        }
        thread::scope(|scope| {
            let waiting = scope.spawn(|| client.recv(LONG, &mut |_, _| ()));
            thread::sleep(Duration::from_millis(50));
            let start = Instant::now();
            client.stop();
            assert!(matches!(waiting.join().unwrap(), Err(Error::Stopped)));
            assert!(start.elapsed() < Duration::from_secs(3));
        });
        drop(server);
    }
}
