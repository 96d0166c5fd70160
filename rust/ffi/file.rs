// SPDX-License-Identifier: GPL-2.0

//! Files of ours: their operations, their device nodes, their descriptors and their inodes.
//!
//! C headers: `include/linux/fs.h`, `include/linux/miscdevice.h`. The `kernel` crate's `miscdevice`
//! has no poll, llseek, flush nor get_unmapped_area.

use super::{
    c,
    remap::Remapper,
    vma::NewMapping, //
};
use crate::rules::queue::Owner;
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    error::{
        from_err_ptr,
        from_result,
        to_result, //
    },
    ffi::{
        c_char,
        c_int,
        c_long,
        c_uint,
        c_ulong, //
    },
    fs::{
        file::FileDescriptorReservation,
        File, //
    },
    mm::virt::VmaNew,
    page::PAGE_SHIFT,
    prelude::*,
    seq_file::SeqFile,
    str::CString,
    sync::{
        poll::PollTable,
        Arc,
        ArcBorrow, //
    },
    types::{
        ForeignOwnable,
        Opaque, //
    },
    uaccess::{
        UserPtr,
        UserSlice,
        UserSliceWriter, //
    }, //
};

/// What stands behind an open file of ours.
pub(crate) trait FileOps: Send + Sync + Sized + 'static {
    /// Carries out an ioctl.
    fn ioctl(this: ArcBorrow<'_, Self>, cmd: u32, arg: UserPtr) -> Result<isize>;

    /// Fills a buffer.
    fn read(this: ArcBorrow<'_, Self>, out: UserSliceWriter, nonblock: bool) -> Result<usize>;

    /// Says what is ready, and registers for when more is.
    fn poll(this: ArcBorrow<'_, Self>, file: &File, table: &PollTable<'_>) -> u32;

    /// Sets a new mapping up.
    fn mmap(this: ArcBorrow<'_, Self>, mapping: NewMapping<'_, Self>) -> Result;

    /// The size of the file in bytes.
    fn size(this: ArcBorrow<'_, Self>) -> u64;

    /// A process has no descriptor of the file any more.
    fn left_by(this: ArcBorrow<'_, Self>, reader: Owner);

    /// The last descriptor of the file is closed.
    fn release(this: Arc<Self>);

    /// Describes the file in /proc/PID/fdinfo.
    fn fdinfo(this: ArcBorrow<'_, Self>, m: &SeqFile);

    /// What remaps its ranges, if anything does.
    fn remapper(&self) -> Option<&Remapper> {
        None
    }
}

/// The file operations of `F`.
struct Fops<F, D>(PhantomData<(F, D)>);

/// # Safety
///
/// `file` is a file whose operations are those of `F`, and its private data is an `Arc<F>`.
pub(super) unsafe fn borrow<'a, F: FileOps>(file: *mut bindings::file) -> ArcBorrow<'a, F> {
    // SAFETY: By the caller's promise. The data stays until the file is released, which no operation
    // on it outlives.
    unsafe { Arc::<F>::borrow((*file).private_data) }
}

impl<F: FileOps, D> Fops<F, D> {
    const fn table(
        open: Option<unsafe extern "C" fn(*mut bindings::inode, *mut bindings::file) -> c_int>,
    ) -> bindings::file_operations {
        bindings::file_operations {
            owner: &raw mut c::__this_module,
            open,
            release: Some(Self::release),
            flush: Some(Self::flush),
            llseek: Some(Self::llseek),
            read: Some(Self::read),
            poll: Some(Self::poll),
            unlocked_ioctl: Some(Self::ioctl),
            compat_ioctl: bindings::compat_ptr_ioctl,
            mmap: Some(Self::mmap),
            get_unmapped_area: Some(Self::get_unmapped_area),
            show_fdinfo: Some(Self::fdinfo),
            ..pin_init::zeroed()
        }
    }

    /// # Safety
    ///
    /// `file` has this table and is being released; its private data is an `Arc<F>` or null.
    unsafe extern "C" fn release(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
        // SAFETY: The file is being released: its private data is ours alone. It is null if the file
        // was never completed.
        if let Some(this) = unsafe { Arc::<F>::try_from_foreign((*file).private_data) } {
            F::release(this);
        }
        0
    }

    /// # Safety
    ///
    /// `file` has this table and is open; its private data is an `Arc<F>`.
    unsafe extern "C" fn flush(file: *mut bindings::file, id: bindings::fl_owner_t) -> c_int {
        // SAFETY: By the caller's promise; the pointer is only compared.
        let (this, held) = unsafe { (borrow::<F>(file), c::kdp_files_hold(file)) };
        // A descriptor of a process that has another one of the same file tells nothing.
        if !held {
            F::left_by(this, Owner(id as usize));
        }
        0
    }

    /// # Safety
    ///
    /// As for `flush()`.
    unsafe extern "C" fn llseek(
        file: *mut bindings::file,
        offset: bindings::loff_t,
        whence: c_int,
    ) -> bindings::loff_t {
        // SAFETY: By the caller's promise.
        unsafe {
            bindings::fixed_size_llseek(file, offset, whence, F::size(borrow::<F>(file)) as i64)
        }
    }

    /// # Safety
    ///
    /// As for `flush()`.
    unsafe extern "C" fn read(
        file: *mut bindings::file,
        buf: *mut c_char,
        len: usize,
        _pos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: By the caller's promise.
        let (this, flags) = unsafe { (borrow::<F>(file), (*file).f_flags) };
        let out = UserSlice::new(UserPtr::from_ptr(buf.cast()), len).writer();
        match F::read(this, out, flags & bindings::O_NONBLOCK != 0) {
            Ok(n) => n as isize,
            Err(e) => e.to_errno() as isize,
        }
    }

    /// # Safety
    ///
    /// As for `flush()`, and `table` is valid or null.
    unsafe extern "C" fn poll(
        file: *mut bindings::file,
        table: *mut bindings::poll_table_struct,
    ) -> bindings::__poll_t {
        // SAFETY: By the caller's promise.
        let (this, file, table) = unsafe {
            (
                borrow::<F>(file),
                File::from_raw_file(file),
                PollTable::from_raw(table),
            )
        };
        F::poll(this, file, &table)
    }

    /// # Safety
    ///
    /// As for `flush()`.
    unsafe extern "C" fn ioctl(file: *mut bindings::file, cmd: c_uint, arg: c_ulong) -> c_long {
        // SAFETY: By the caller's promise.
        let this = unsafe { borrow::<F>(file) };
        match F::ioctl(this, cmd, UserPtr::from_addr(arg)) {
            Ok(value) => value as c_long,
            Err(e) => e.to_errno() as c_long,
        }
    }

    /// # Safety
    ///
    /// As for `flush()`, and `vma` is a new area of that file.
    unsafe extern "C" fn mmap(
        file: *mut bindings::file,
        vma: *mut bindings::vm_area_struct,
    ) -> c_int {
        // SAFETY: By the caller's promise; the file holds the `Arc`.
        let (this, mapping) = unsafe {
            (
                borrow::<F>(file),
                NewMapping::new(VmaNew::from_raw(vma), borrow::<F>(file)),
            )
        };
        let result = from_result(|| F::mmap(this, mapping).map(|()| 0));
        if let Some(remapper) = this.remapper().filter(|r| result == 0 && r.is_ours()) {
            // SAFETY: By the caller's promise.
            unsafe { remapper.put_back(vma) };
        }
        result
    }

    /// # Safety
    ///
    /// As for `flush()`, and the caller holds its mmap lock.
    unsafe extern "C" fn get_unmapped_area(
        file: *mut bindings::file,
        address: c_ulong,
        bytes: c_ulong,
        pgoff: c_ulong,
        flags: c_ulong,
    ) -> c_ulong {
        // SAFETY: By the caller's promise.
        let this = unsafe { borrow::<F>(file) };
        let Some(remapper) = this.remapper().filter(|r| r.is_ours()) else {
            // SAFETY: By the caller's promise.
            return unsafe { bindings::thp_get_unmapped_area(file, address, bytes, pgoff, flags) };
        };
        // SAFETY: By the caller's promise, and as just seen.
        let verified = unsafe { remapper.verify(file, address, bytes, pgoff as u64) };
        verified.unwrap_or_else(|e| e.to_errno() as usize)
    }

    /// # Safety
    ///
    /// As for `flush()`, and `m` is a valid seq_file.
    unsafe extern "C" fn fdinfo(m: *mut bindings::seq_file, file: *mut bindings::file) {
        // SAFETY: By the caller's promise.
        let (this, m) = unsafe { (borrow::<F>(file), SeqFile::from_raw(m)) };
        F::fdinfo(this, m);
    }
}

impl<F: FileOps> Fops<F, ()> {
    /// For files that have no device node.
    const TABLE: bindings::file_operations = Self::table(None);
}

/// What stands behind a device node.
pub(crate) trait Device: Send + Sync + 'static {
    /// What an open of it gives.
    type Opened: FileOps;

    /// Opens it.
    fn open(&self) -> Result<Arc<Self::Opened>>;

    /// The inode whose mapping all files of the object share, if there is one.
    fn inode(&self) -> Option<&Inode>;
}

impl<D: Device> Fops<D::Opened, D> {
    /// For files that are opened through a device node.
    const DEVICE_TABLE: bindings::file_operations = Self::table(Some(Self::open));

    /// # Safety
    ///
    /// `file` has this table and is being opened, by misc_open().
    unsafe extern "C" fn open(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
        // SAFETY: misc_open() left the miscdevice in the file, which is the one of a `Node<D>`: only
        // those have this table. It holds misc_mtx, so the node is not dropped meanwhile.
        let node = unsafe {
            let misc = Opaque::cast_from(c::kdp_file_misc(file));
            &*kernel::container_of!(misc, Node<D>, misc)
        };
        from_result(|| {
            let opened = node.device.open()?;
            if let Some(inode) = node.device.inode() {
                // SAFETY: The file is being opened, and the object that it is going to hold holds the
                // inode.
                unsafe { c::kdp_file_redirect(file, inode.0.as_ptr()) };
            }
            // SAFETY: The file is being opened: its private data is ours to set.
            unsafe { (*file).private_data = opened.into_foreign() };
            Ok(0)
        })
    }
}

/// A device node under /dev.
///
/// # Invariants
///
/// `misc` is registered from `new()` to drop.
#[pin_data(PinnedDrop)]
pub(crate) struct Node<D: Device> {
    #[pin]
    misc: Opaque<bindings::miscdevice>,
    device: D,
    name: CString,
}

// SAFETY: A miscdevice may be deregistered by any thread.
unsafe impl<D: Device> Send for Node<D> {}
// SAFETY: `device` is `Sync`, and nothing else is accessed through a shared reference.
unsafe impl<D: Device> Sync for Node<D> {}

impl<D: Device> Node<D> {
    /// Makes the node /dev/`name` (a "!" in it becomes a "/"), for root alone. No other device may
    /// have the name: the caller sees to that.
    pub(crate) fn new(name: CString, device: D) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            name,
            device,
            misc <- Opaque::try_ffi_init(|slot: *mut bindings::miscdevice| {
                let misc = bindings::miscdevice {
                    minor: bindings::MISC_DYNAMIC_MINOR as c_int,
                    name: name.as_char_ptr(),
                    fops: &Fops::<D::Opened, D>::DEVICE_TABLE,
                    mode: 0o600,
                    ..pin_init::zeroed()
                };
                // SAFETY: `slot` is valid for a write, and pinned from here on; the name's bytes are
                // on the heap and stay until drop. An open cannot see the other fields before they
                // are written: they come first.
                unsafe {
                    slot.write(misc);
                    to_result(bindings::misc_register(slot))
                }
            }),
        })
    }
}

#[pinned_drop]
impl<D: Device> PinnedDrop for Node<D> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: It is registered (type invariant).
        unsafe { bindings::misc_deregister(self.misc.get()) };
    }
}

/// A reference on any file.
///
/// # Invariants
///
/// Holds a reference on a `struct file`.
pub(crate) struct RawFile(NonNull<bindings::file>);

// SAFETY: A file may be put by any thread.
unsafe impl Send for RawFile {}
// SAFETY: Its methods may be called by any thread.
unsafe impl Sync for RawFile {}

impl RawFile {
    /// The file behind a descriptor of this process.
    pub(crate) fn get(fd: i32) -> Result<Self> {
        // SAFETY: fget() takes any number.
        let file = unsafe { bindings::fget(u32::try_from(fd).map_err(|_| EBADF)?) };
        // INVARIANT: fget() returned a reference.
        NonNull::new(file).map(Self).ok_or(EBADF)
    }

    /// Takes over a new file.
    ///
    /// # Safety
    ///
    /// `file` is a valid file with a reference that is the caller's, or an error.
    pub(super) unsafe fn of_new(file: *mut bindings::file) -> Result<Self> {
        // INVARIANT: By the caller's promise.
        NonNull::new(from_err_ptr(file)?).map(Self).ok_or(ENOMEM)
    }

    /// Another reference on a file.
    ///
    /// # Safety
    ///
    /// `file` is valid, or null.
    pub(super) unsafe fn another(file: *mut bindings::file) -> Option<Self> {
        let file = NonNull::new(file)?;
        // SAFETY: By the caller's promise.
        // INVARIANT: A reference is taken.
        unsafe { bindings::get_file(file.as_ptr()) };
        Some(Self(file))
    }

    /// A new file on an inode of its own, whose private data is what `make` makes.
    pub(crate) fn with_inode<F: FileOps>(
        make: impl FnOnce(Inode) -> Result<Arc<F>>,
    ) -> Result<Self> {
        // SAFETY: The table is static. The file is new.
        let this = unsafe { Self::of_new(c::kdp_memslot_file(&Fops::<F, ()>::TABLE))? };
        let file = this.as_ptr();
        // SAFETY: The file is valid; a reference on its inode is taken.
        let inode = unsafe { c::kdp_file_inode_get(file) };
        // INVARIANT: The reference was just taken.
        let data = make(Inode(NonNull::new(inode).ok_or(ENOMEM)?))?;
        // SAFETY: No descriptor names the file yet: nobody else uses it.
        unsafe { (*file).private_data = data.into_foreign() };
        Ok(this)
    }

    /// A new file whose private data is what `make` makes.
    pub(crate) fn with_data<F: FileOps>(make: impl FnOnce() -> Result<Arc<F>>) -> Result<Self> {
        // SAFETY: The table is static. The file is new.
        let this = unsafe { Self::of_new(c::kdp_claimant_file(&Fops::<F, ()>::TABLE))? };
        // SAFETY: No descriptor names the file yet: nobody else uses it.
        unsafe { (*this.as_ptr()).private_data = make()?.into_foreign() };
        Ok(this)
    }

    /// A new file of the inode of `memfd`, which is of shmem, open for writing or not, whose private data is what `make`
    /// makes. It is for areas: no process may get a descriptor of it (native.c).
    pub(crate) fn of_memfd<F: FileOps>(
        memfd: &RawFile,
        writable: bool,
        make: impl FnOnce() -> Arc<F>,
    ) -> Result<Self> {
        let table = &Fops::<F, ()>::TABLE;
        // SAFETY: The memfd is valid; the table is static. The file is new.
        let this = unsafe { Self::of_new(c::kdp_native_file(memfd.as_ptr(), writable, table))? };
        // SAFETY: The file is new: nobody else uses it.
        unsafe { (*this.as_ptr()).private_data = make().into_foreign() };
        Ok(this)
    }

    /// The file.
    pub(crate) fn as_ptr(&self) -> *mut bindings::file {
        self.0.as_ptr()
    }

    /// Binds a reserved descriptor to the file.
    pub(crate) fn install(&self, fd: FileDescriptorReservation) {
        let another = self.clone();
        // SAFETY: The file is valid; the reference that fd_install() consumes was just taken, and the
        // reservation is used up.
        unsafe { bindings::fd_install(fd.reserved_fd(), another.as_ptr()) };
        core::mem::forget(another);
        core::mem::forget(fd);
    }
}

impl Clone for RawFile {
    fn clone(&self) -> Self {
        // SAFETY: The file is valid (type invariant).
        // INVARIANT: A reference is taken.
        unsafe { bindings::get_file(self.0.as_ptr()) };
        Self(self.0)
    }
}

impl Drop for RawFile {
    fn drop(&mut self) {
        // SAFETY: The reference is ours (type invariant) and not used again.
        unsafe { bindings::fput(self.0.as_ptr()) };
    }
}

/// Unmaps `count` pages from `first` on of a file from everybody, and `copies` of private mappings.
///
/// # Safety
///
/// `mapping` is valid.
pub(super) unsafe fn unmap(
    mapping: *mut bindings::address_space,
    first: u64,
    count: u64,
    copies: bool,
) {
    // SAFETY: By the caller's promise.
    unsafe {
        bindings::unmap_mapping_range(
            mapping,
            (first << PAGE_SHIFT) as i64,
            (count << PAGE_SHIFT) as i64,
            copies.into(),
        )
    };
}

/// The inode of a memslot, which mappings hang on: of the bitmap, and of memory on hugetlb.
///
/// # Invariants
///
/// Holds a reference on a `struct inode`.
pub(crate) struct Inode(NonNull<bindings::inode>);

// SAFETY: An inode may be put by any thread.
unsafe impl Send for Inode {}
// SAFETY: Its methods may be called by any thread.
unsafe impl Sync for Inode {}

impl Inode {
    /// Unmaps `count` pages from `first` on from every process that maps a file of this inode. What
    /// is mapped in between is the caller's to exclude. May sleep.
    pub(crate) fn unmap(&self, first: u64, count: u64) {
        // SAFETY: The inode, and thus its mapping, is valid (type invariant).
        unsafe { unmap((*self.0.as_ptr()).i_mapping, first, count, true) };
    }
}

impl Inode {
    /// Whether a file, or none, is of this inode.
    ///
    /// # Safety
    ///
    /// `file` is valid or null.
    pub(super) unsafe fn is_of(&self, file: *const bindings::file) -> bool {
        // SAFETY: By the caller's promise; all files of the inode share its mapping.
        unsafe { !file.is_null() && (*file).f_mapping == (*self.0.as_ptr()).i_mapping }
    }
}

impl Drop for Inode {
    fn drop(&mut self) {
        // SAFETY: The reference is ours (type invariant) and not used again.
        unsafe { bindings::iput(self.0.as_ptr()) };
    }
}
