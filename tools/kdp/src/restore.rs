//! `kdp restore`.

use crate::{cli::RestoreArgs, failure::Failure, memory, ready::Ready, signals, units::human};
use kvm_demand_paging::{source::PageFile, Memslot, Vm, PAGE_SIZE};
use std::sync::mpsc;

const PAGE: u64 = PAGE_SIZE as u64;

/// Make the memslot, and hold its path until a signal comes.
pub fn run(args: &RestoreArgs) -> Result<(), Failure> {
    let file = PageFile::parse(&args.file)?;
    let path = file.path();
    let size = args.size.unwrap_or(file.pages() * PAGE);
    if size > file.pages() * PAGE {
        return Err(Failure::Other(format!(
            "{} has {} from its offset on, fewer than the {} of --size",
            path.display(),
            human(file.pages() * PAGE),
            human(size)
        )));
    }
    let vm = Vm::open()?;
    let memfd = memory::create(&vm, &args.create, args.hugetlb, args.shmem_huge, size)?;
    let _memslot = vm
        .create_memslot(0, &memfd)
        .poison_signals(true)
        .name(&args.create)
        .paging(true)
        .create()?;
    vm.set_source(0, &file, file.offset(), None)?;
    println!(
        "{} is there: {}, read from {} as it is touched",
        Memslot::path(&args.create).display(),
        human(size),
        path.display()
    );
    let (end, ended) = mpsc::channel();
    let tell = move || {
        // The receiver lives until the first message.
        let _ = end.send(());
    };
    signals::watch(tell, || ())?;
    let _ready = Ready::tell(args.ready_file.as_ref())?;
    // Fails if the thread that watches has ended, which is as good.
    let _ = ended.recv();
    Ok(())
}
