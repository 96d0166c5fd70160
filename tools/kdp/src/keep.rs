//! `kdp keep` and `kdp kept`.

use crate::{
    cli::{KeepArgs, KeptArgs},
    failure::{Context, Failure},
    ready::Ready,
    signals,
};
use kvm_demand_paging::{
    keeper::{self, Keeper},
    source::bind_unix,
};
use std::{fs, sync::mpsc, thread};

/// Keep VMs until a signal comes.
pub fn run(args: &KeepArgs) -> Result<(), Failure> {
    let path = &args.listen;
    let listener = bind_unix(path).on(format_args!("cannot listen at unix:{}", path.display()))?;
    let keeper = Keeper::new();
    let (end, ended) = mpsc::channel();
    let (by_signal, by_failure) = (end.clone(), end);
    let tell = keeper.clone();
    signals::watch(
        // The receiver lives until the first message.
        move || drop(by_signal.send(Ok(()))),
        move || println!("keeping {} VMs", tell.count()),
    )?;
    let server = keeper.clone();
    thread::spawn(move || drop(by_failure.send(server.serve(&listener))));
    println!("listening at unix:{}", path.display());
    let ready = Ready::tell(args.ready_file.as_ref())?;
    let result = ended.recv().unwrap_or(Ok(()));
    drop(ready);
    let _ = fs::remove_file(path);
    if keeper.count() > 0 {
        tracing::warn!("{} VMs are let go", keeper.count());
    }
    Ok(result?)
}

/// List or release.
pub fn kept(args: &KeptArgs) -> Result<(), Failure> {
    match &args.release {
        Some(name) => keeper::release(&args.at, name)?,
        None => keeper::list(&args.at)?
            .iter()
            .for_each(|name| println!("{name}")),
    }
    Ok(())
}
