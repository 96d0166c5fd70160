//! `kdp keep` and `kdp kept`.

use crate::{
    cli::{Cli, KeepArgs, KeptArgs},
    failure::{Context, Failure},
    ready::Ready,
    signals,
    systemd::{DescriptorStore, Passed},
};
use clap::{error::ErrorKind, CommandFactory};
use kvm_demand_paging::{
    keeper::{self, Keeper},
    source::bind_unix,
};
use std::{
    fs,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    sync::{mpsc, Arc},
    thread,
};

/// Keep VMs until a signal comes.
pub fn run(args: &KeepArgs) -> Result<(), Failure> {
    let mut passed = Passed::take()?;
    let activated = passed.take_listener()?;
    let is_activated = activated.is_some();
    let (listener, path) = match activated {
        Some(listener) => activated_at(listener, args.listen.as_deref())?,
        None => bind(args.listen.as_deref())?,
    };
    let store = DescriptorStore::open(&passed);
    let is_stored = store.is_some();
    let keeper = store.map_or_else(Keeper::new, |store| Keeper::with_store(Arc::new(store)));
    keeper.restore(passed.stored)?;

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
    if !is_activated {
        let _ = fs::remove_file(path);
    }
    match keeper.count() {
        0 => (),
        count if is_stored => {
            tracing::info!("{count} VMs stay in the service manager's fd store")
        }
        count => tracing::warn!("the keeper releases {count} VMs"),
    }
    Ok(result?)
}

/// The socket that the service manager passed, and its path.
fn activated_at(
    listener: UnixListener,
    listen: Option<&Path>,
) -> Result<(UnixListener, PathBuf), Failure> {
    let address = listener.local_addr().on("the socket of systemd")?;
    let Some(path) = address.as_pathname() else {
        return Err(Failure::Other(
            "systemd passed a socket without a path: ListenStream= of its unit must be a path"
                .to_owned(),
        ));
    };
    match listen {
        Some(listen) if listen != path => Err(Failure::Other(format!(
            "--listen is unix:{}, but systemd passed a socket that listens at unix:{}: \
             leave --listen out",
            listen.display(),
            path.display()
        ))),
        _ => Ok((listener, path.to_owned())),
    }
}

fn bind(listen: Option<&Path>) -> Result<(UnixListener, PathBuf), Failure> {
    let Some(path) = listen else {
        Cli::command()
            .error(
                ErrorKind::MissingRequiredArgument,
                "no socket to listen at: give --listen unix:PATH, \
                 or start 'kdp keep' from a socket unit of systemd",
            )
            .exit()
    };
    let listener = bind_unix(path).on(format_args!("cannot listen at unix:{}", path.display()))?;
    Ok((listener, path.to_owned()))
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
