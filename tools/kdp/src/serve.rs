//! `kdp serve`.

use crate::{cli::ServeArgs, failure::Failure, ready::Ready, signals, units::human};
use kvm_demand_paging::source::{PageFile, Server, ServerCounters};

pub fn run(args: &ServeArgs) -> Result<(), Failure> {
    let file = PageFile::parse(&args.file)?;
    println!(
        "serving {} ({} pages of 4096 bytes)",
        file.path().display(),
        file.pages()
    );
    let server = Server::bind(&args.listen, file)?;
    let (stop, tell, json) = (server.control(), server.control(), args.json);
    signals::watch(move || stop.stop(), move || print(&tell.counters(), json))?;
    println!("listening at {}", server.address());
    let ready = Ready::tell(args.ready_file.as_ref())?;
    let result = server.run();
    drop(ready);
    result?;
    print(&server.control().counters(), json);
    Ok(())
}

fn print(counters: &ServerCounters, json: bool) {
    if json {
        // A struct of integers always has a JSON form.
        println!("{}", serde_json::to_string(counters).unwrap_or_default());
        return;
    }
    println!(
        "sent {} pages ({} of zeros, {} unreadable), {}, in {} requests of {} clients; {} refused",
        counters.pages,
        counters.zero_pages,
        counters.failed_pages,
        human(counters.bytes),
        counters.requests,
        counters.clients,
        counters.refused
    );
}
