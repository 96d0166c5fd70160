// SPDX-License-Identifier: GPL-2.0

//! vhost-net on absent pages, and on lost ones: its worker is a thread of the kernel's that reads and writes guest memory.

use std::sync::Arc;

use kvm_demand_paging::{Backing, Cause, PageRange, State, Who};

use crate::check::Result;
use crate::slot::{Slot, BACKINGS, ID, PAGE};
use crate::task::{until, Task, MOMENT, PATIENCE};
use crate::tun::{frame, Tap, HEADER};
use crate::vhost::{Queue, Vhost, DRIVER_PAGE, USED_PAGE};

tests! {
    "fault-vhost-sends-from-an-absent-page" => sends_from_an_absent_page,
    "fault-vhost-receives-into-an-absent-page" => receives_into_an_absent_page,
    "fault-vhost-rings-absent" => rings_absent,
    "poison-vhost-sends-nothing-of-a-lost-page" => sends_nothing_of_a_lost_page,
    "poison-vhost-receives-nothing-into-a-lost-page" => receives_nothing_into_a_lost_page,
}

const BUFFER: u64 = 2;

fn buffer_page(packet: &[u8]) -> [u8; PAGE as usize] {
    let mut page = [0xee; PAGE as usize];
    page[..HEADER].fill(0);
    page[HEADER..HEADER + packet.len()].copy_from_slice(packet);
    page
}

/// Makes the rings present, with one buffer of this length available.
fn place_rings(slot: &Slot, vhost: &Vhost, len: u32) -> Result {
    slot.alias
        .write(DRIVER_PAGE, &vhost.driver_page(BUFFER, len))?;
    slot.alias.write(USED_PAGE, &[0; PAGE as usize])?;
    for page in [DRIVER_PAGE, USED_PAGE] {
        slot.mark(State::Present, page)?;
    }
    Ok(())
}

/// The packet to be sent is in an absent page: the worker waits, an event says that the kernel reads, and
/// then the packet comes out with the right bytes.
fn sends_from_an_absent_page() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let tap = Tap::new()?;
        let vhost = Vhost::new(&slot, Queue::Transmit)?;
        let packet = frame(900, 3);
        let len = (HEADER + packet.len()) as u32;
        place_rings(&slot, &vhost, len)?;
        vhost.start(&tap)?;
        vhost.kick()?;
        let event = slot.event()?;
        ensure_eq!(
            (event.page, event.access.who, event.access.write),
            (BUFFER, Who::Kernel, false),
            "the event"
        );
        ensure!(
            !tap.packet_came(MOMENT)?,
            "a packet came, though its page is absent"
        );
        slot.alias.write(BUFFER, &buffer_page(&packet))?;
        slot.mark(State::Present, BUFFER)?;
        ensure!(tap.packet_came(PATIENCE)?, "no packet came");
        ensure!(tap.receive()? == packet, "the packet has other bytes");
        until("vhost has used the buffer", || Ok(vhost.used()?.0 == 1))?;
        slot.no_event()?;
    }
    Ok(())
}

/// The buffer for a packet that comes in is in an absent page: the worker waits, an event says that the
/// kernel writes, and then the packet is in the page.
fn receives_into_an_absent_page() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let tap = Tap::new()?;
        let vhost = Vhost::new(&slot, Queue::Receive)?;
        let packet = frame(700, 77);
        place_rings(&slot, &vhost, 2000)?;
        vhost.start(&tap)?;
        tap.send(&packet)?;
        let event = slot.event()?;
        ensure_eq!(
            (event.page, event.access.who, event.access.write),
            (BUFFER, Who::Kernel, true),
            "the event"
        );
        std::thread::sleep(MOMENT);
        ensure_eq!(vhost.used()?.0, 0, "buffers used while the page is absent");
        slot.place(BUFFER, 1)?;
        until("vhost has used the buffer", || Ok(vhost.used()?.0 == 1))?;
        let used = (1, (HEADER + packet.len()) as u32);
        ensure_eq!(vhost.used()?, used, "buffers used, and bytes in the first");
        let mut page = [0; PAGE as usize];
        slot.alias.read(BUFFER, &mut page)?;
        ensure!(
            page[HEADER..HEADER + packet.len()] == packet[..],
            "the packet has other bytes"
        );
    }
    Ok(())
}

/// The memory of a queue whose buffer is lost.
fn with_lost_buffer(slot: &Slot, vhost: &Vhost, len: u32, buffer: &[u8]) -> Result {
    place_rings(slot, vhost, len)?;
    slot.alias.write(BUFFER, buffer)?;
    slot.mark(State::Present, BUFFER)?;
    slot.vm
        .poison(ID, &[PageRange::page(BUFFER)], Cause::Emulated)?;
    Ok(())
}

/// The packet to be sent is in a lost page: the copy fails, and nothing of it goes out. Once the page is healed it does.
fn sends_nothing_of_a_lost_page() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let tap = Tap::new()?;
        let vhost = Vhost::new(&slot, Queue::Transmit)?;
        let packet = frame(900, 3);
        let len = (HEADER + packet.len()) as u32;
        with_lost_buffer(&slot, &vhost, len, &buffer_page(&packet))?;
        vhost.start(&tap)?;
        vhost.kick()?;
        until("the worker has touched the page", || {
            Ok(slot.counter("poisoned-touches")? > 0)
        })?;
        ensure!(
            !tap.packet_came(MOMENT)?,
            "a packet came out of a lost page"
        );
        ensure_eq!(vhost.used()?.0, 0, "buffers used");
        slot.vm.heal(ID, &[PageRange::page(BUFFER)])?;
        vhost.kick()?;
        ensure!(tap.packet_came(PATIENCE)?, "no packet came");
        ensure!(tap.receive()? == packet, "the packet has other bytes");
        slot.no_event()?;
    }
    Ok(())
}

/// The buffer for a packet that comes in is in a lost page: it is not written to, and the buffer is not used. Once the page
/// is healed it takes the next packet.
fn receives_nothing_into_a_lost_page() -> Result {
    for (backing, pages) in BACKINGS {
        let slot = Slot::new(backing, pages)?;
        let tap = Tap::new()?;
        let vhost = Vhost::new(&slot, Queue::Receive)?;
        with_lost_buffer(&slot, &vhost, 2000, &[0xee; PAGE as usize])?;
        vhost.start(&tap)?;
        tap.send(&frame(700, 77))?;
        until("the worker has touched the page", || {
            Ok(slot.counter("poisoned-touches")? > 0)
        })?;
        std::thread::sleep(MOMENT);
        ensure_eq!(vhost.used()?.0, 0, "buffers used");
        let mut page = [0; PAGE as usize];
        slot.alias.read(BUFFER, &mut page)?;
        ensure!(page == [0xee; PAGE as usize], "a lost page was written to");
        slot.vm.heal(ID, &[PageRange::page(BUFFER)])?;
        let packet = frame(700, 78);
        tap.send(&packet)?;
        until("vhost has used the buffer", || Ok(vhost.used()?.0 == 1))?;
        slot.alias.read(BUFFER, &mut page)?;
        ensure!(
            page[HEADER..HEADER + packet.len()] == packet[..],
            "the packet has other bytes"
        );
    }
    Ok(())
}

/// The rings themselves are absent, too: the call that starts vhost waits, then its worker.
fn rings_absent() -> Result {
    let slot = Slot::new(Backing::Shmem, 8)?;
    let tap = Arc::new(Tap::new()?);
    let vhost = Arc::new(Vhost::new(&slot, Queue::Transmit)?);
    let packet = frame(300, 9);
    let len = (HEADER + packet.len()) as u32;
    let (starting, to) = (vhost.clone(), tap.clone());
    let start = Task::spawn(move || {
        starting.start(&to)?;
        starting.kick()
    })?;
    let mut served = Vec::new();
    while !tap.packet_came(std::time::Duration::ZERO)? {
        let event = slot.event()?;
        ensure_eq!(
            event.access.who,
            Who::Kernel,
            "who touched page {}",
            event.page
        );
        let bytes = match event.page {
            DRIVER_PAGE => vhost.driver_page(BUFFER, len),
            USED_PAGE => [0; PAGE as usize],
            BUFFER => buffer_page(&packet),
            other => fail!("an event for page {other}"),
        };
        slot.alias.write(event.page, &bytes)?;
        slot.mark(State::Present, event.page)?;
        served.push(event.page);
        if event.page == BUFFER {
            ensure!(tap.packet_came(PATIENCE)?, "no packet came");
        }
    }
    served.sort_unstable();
    ensure_eq!(served, [DRIVER_PAGE, USED_PAGE, BUFFER], "pages served");
    start.join("the call that starts vhost")??;
    ensure!(tap.receive()? == packet, "the packet has other bytes");
    Ok(())
}
