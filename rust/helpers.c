// SPDX-License-Identifier: GPL-2.0
/* See helpers.h. */
#include <linux/anon_inodes.h>
#include <linux/capability.h>
#include <linux/falloc.h>
#include <linux/fcntl.h>
#include <linux/fdtable.h>
#include <linux/hashtable.h>
#include <linux/highmem.h>
#include <linux/hugetlb.h>
#include <linux/kvm_host.h>
#include <linux/memfd.h>
#include <linux/mman.h>
#include <linux/mutex.h>
#include <linux/pagemap.h>
#include <linux/percpu.h>
#include <linux/pid.h>
#include <linux/sched/clock.h>
#include <linux/sched/signal.h>
#include <linux/sched/stat.h>
#include <linux/shmem_fs.h>
#include <linux/wait.h>
#include <linux/wait_bit.h>
#include <linux/workqueue.h>
#include <asm/syscall.h>

#include "helpers.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

/* memory mapping */

/* Whether a huge entry maps where a fault of one page is. */
bool kdp_fault_is_in_block(const struct vm_fault *vmf)
{
	return pmd_trans_huge(pmdp_get_lockless(vmf->pmd));
}

/*
 * Whether an address near a fault of one page is mapped. Also true if the address lies outside the
 * VMA or outside the fault's page table, and if there is no page table.
 *
 * In native memory, the kernel may free the page table meanwhile (retract_page_tables() in
 * mm/khugepaged.c, MADV_DONTNEED). It waits for an RCU grace period first.
 */
bool kdp_fault_is_mapped(const struct vm_fault *vmf, unsigned long address)
{
	bool mapped = true;
	pmd_t pmd;

	rcu_read_lock();
	pmd = pmdp_get_lockless(vmf->pmd);
	if (address >= vmf->vma->vm_start && address < vmf->vma->vm_end &&
	    !((address ^ vmf->address) & PMD_MASK) && pmd_present(pmd) && !pmd_leaf(pmd))
		mapped = !pte_none(ptep_get_lockless(pte_offset_kernel(&pmd, address)));
	rcu_read_unlock();
	return mapped;
}

struct around {
	const struct vm_area_struct *vma;
	unsigned long start;
	const unsigned long *pfns;
	u64 there;
};

/* As insert_pfn() in mm/memory.c. The page table is locked. */
static int insert_around(pte_t *pte, unsigned long address, void *data)
{
	const struct around *around = data;
	unsigned int i = (address - around->start) >> PAGE_SHIFT;

	if (around->there & BIT_ULL(i) && pte_none(ptep_get(pte)))
		set_pte_at(around->vma->vm_mm, address, pte,
			   pte_mkspecial(pfn_pte(around->pfns[i],
						 around->vma->vm_page_prot)));
	return 0;
}

/*
 * Maps those of the page frames from @address on whose bits are set in @there, which
 * is not 0, where nothing is mapped. No huge entry is there.
 */
void kdp_insert_pfns(struct vm_area_struct *vma, unsigned long address,
		     const unsigned long *pfns, u64 there)
{
	struct around around = {
		.vma = vma,
		.start = address,
		.pfns = pfns,
		.there = there,
	};

	/* What fails for want of a page table is left to its own fault. */
	apply_to_page_range(vma->vm_mm, address,
			    (unsigned long)fls64(there) << PAGE_SHIFT,
			    insert_around, &around);
}

/* Whether the PMD of a huge fault is still empty. */
bool kdp_fault_is_empty(const struct vm_fault *vmf)
{
	return pmd_none(pmdp_get_lockless(vmf->pmd));
}

/*
 * Whether a kernel thread asks by get_user_pages() for another process's memory, as KVM's
 * asynchronous page faults do.
 */
bool kdp_fault_is_in_kthread(const struct vm_fault *vmf)
{
	return current->flags & PF_KTHREAD && vmf->flags & FAULT_FLAG_REMOTE;
}

/* Whether such a kernel thread is a kworker. */
bool kdp_fault_is_in_kworker(const struct vm_fault *vmf)
{
	return kdp_fault_is_in_kthread(vmf) && current->flags & PF_WQ_WORKER;
}

void kdp_release_fault_lock(struct vm_fault *vmf)
{
	release_fault_lock(vmf);
}

bool kdp_vma_is_shared(const struct vm_area_struct *vma)
{
	/* A file that is open for reading only loses VM_SHARED (do_mmap()). */
	return vma->vm_flags & VM_MAYSHARE;
}

pgoff_t kdp_vma_pgoff(const struct vm_area_struct *vma)
{
	return vma->vm_pgoff;
}

void kdp_vma_setup(struct vm_area_struct *vma, vm_flags_t flags,
		   const struct vm_operations_struct *ops, void *owner)
{
	vm_flags_set(vma, flags);
	vma->vm_ops = ops;
	vma->vm_private_data = owner;
}

void kdp_vma_change_flags(struct vm_area_struct *vma, vm_flags_t add, vm_flags_t clear)
{
	vm_flags_mod(vma, add, clear);
}

/* Whether huge faults reach the area's handler at all. */
bool kdp_vma_may_be_huge(struct vm_area_struct *vma)
{
	return !vma_thp_disabled(vma, vma->vm_flags, false);
}

/*
 * Whether there is a page table where a block could be mapped by one entry. The
 * mmap lock of @mm is held, and an area is mapped at @address.
 */
bool kdp_has_page_table(struct mm_struct *mm, unsigned long address)
{
	pgd_t *pgd = pgd_offset(mm, address);
	p4d_t *p4d;
	pud_t pud;
	pmd_t pmd;

	if (pgd_none(READ_ONCE(*pgd)))
		return false;
	p4d = p4d_offset(pgd, address);
	if (p4d_none(READ_ONCE(*p4d)))
		return false;
	pud = READ_ONCE(*pud_offset(p4d, address));
	if (!pud_present(pud) || pud_leaf(pud))
		return false;
	pmd = pmdp_get_lockless(pmd_offset(&pud, address));
	return pmd_present(pmd) && !pmd_leaf(pmd);
}

void kdp_mmap_read_lock(struct mm_struct *mm)
{
	mmap_read_lock(mm);
}

void kdp_mmap_read_unlock(struct mm_struct *mm)
{
	mmap_read_unlock(mm);
}

int kdp_map_count(const struct mm_struct *mm)
{
	return READ_ONCE(mm->map_count);
}

/* Whether a process has @mm still. */
bool kdp_mm_is_used(struct mm_struct *mm)
{
	return atomic_read(&mm->mm_users);
}

bool kdp_current_may_use_mm(void)
{
	return current->flags & PF_KTHREAD && !current->mm;
}

/* Maps a range of the current process over itself, as an area of @flags is. */
unsigned long kdp_map_anew(struct file *file, unsigned long address,
			   unsigned long bytes, vm_flags_t flags,
			   unsigned long pgoff)
{
	unsigned long prot = 0, how = MAP_SHARED | MAP_FIXED;

	if (flags & VM_READ)
		prot |= PROT_READ;
	if (flags & VM_WRITE)
		prot |= PROT_WRITE;
	if (flags & VM_EXEC)
		prot |= PROT_EXEC;
	if (flags & VM_NORESERVE)
		how |= MAP_NORESERVE;
	return vm_mmap(file, address, bytes, prot, how, pgoff << PAGE_SHIFT);
}

/* memory backing */

unsigned int kdp_memfd_seals(struct file *file, bool *is_memfd)
{
	*is_memfd = true;
	if (shmem_file(file))
		return SHMEM_I(file_inode(file))->seals;
#ifdef CONFIG_HUGETLBFS
	if (is_file_hugepages(file))
		return HUGETLBFS_I(file_inode(file))->seals;
#endif
	*is_memfd = false;
	return 0;
}

/* log2 of the pages of one allocation of the file. */
unsigned int kdp_memfd_order(struct file *file)
{
	if (is_file_hugepages(file))
		return huge_page_order(hstate_file(file));
	return 0;
}

loff_t kdp_file_size(struct file *file)
{
	return i_size_read(file_inode(file));
}

bool kdp_file_writable(struct file *file)
{
	return file->f_mode & FMODE_WRITE;
}

/* While it is held, F_SEAL_WRITE cannot be added. */
int kdp_mapping_hold_writable(struct file *file)
{
	return mapping_map_writable(file->f_mapping);
}

void kdp_mapping_release_writable(struct file *file)
{
	mapping_unmap_writable(file->f_mapping);
}

/*
 * Allocates a huge page, unless the memfd has it. memfd_pin_folios() could do
 * that, but not when two do it at once: who comes second takes a reservation
 * that is another page's, finds the first one's page, and never gives it back
 * (memfd_alloc_folio() in mm/memfd.c). In the end the count of reservations wraps
 * around, and nobody can reserve a huge page any more. fallocate() looks under
 * the lock first.
 */
static long kdp_allocate_huge(struct file *memfd, pgoff_t index)
{
	struct folio *folio = filemap_get_folio(memfd->f_mapping, index);

	if (!IS_ERR(folio)) {
		folio_put(folio);
		return 0;
	}
	return memfd->f_op->fallocate(memfd, FALLOC_FL_KEEP_SIZE,
				      (loff_t)index << PAGE_SHIFT,
				      huge_page_size(hstate_file(memfd)));
}

static __always_inline long pin_folio(struct file *memfd, pgoff_t index,
				      struct folio **folio, pgoff_t *offset)
{
	loff_t start = (loff_t)index << PAGE_SHIFT;

	return memfd_pin_folios(memfd, start, start + PAGE_SIZE - 1, folio, 1,
				offset) ?: -ENOMEM;
}

/*
 * A folio of ZONE_MOVABLE is moved out of it before it is pinned, and that fails
 * with -ENOMEM if another thread has a pin on it just then, for the same purpose
 * (migrate_longterm_unpinnable_folios() in mm/gup.c). So who has failed tries again
 * while others who have failed wait: a vCPU must not fail because another one
 * touches the same page. Those who come for the first time do not wait, so it may
 * take more than one try. A leaf but for the memfd's own locks.
 */
static noinline __cold long pin_folio_alone(struct file *memfd, pgoff_t index,
					    struct folio **folio,
					    pgoff_t *offset)
{
	static DEFINE_MUTEX(alone);
	int tries = 10;
	long n;

	mutex_lock(&alone);
	do
		n = pin_folio(memfd, index, folio, offset);
	while (n == -ENOMEM && --tries && !fatal_signal_pending(current));
	mutex_unlock(&alone);
	return n;
}

/* In line: every fault that brings a page in comes here. */
static __always_inline long kdp_pin_folio(struct file *memfd, pgoff_t index,
					  struct folio **folio, pgoff_t *offset)
{
	long n = pin_folio(memfd, index, folio, offset);

	return n != -ENOMEM ? n : pin_folio_alone(memfd, index, folio, offset);
}

/* Pins the huge page at @index; *@pfn is its frame. 1 if any page of it had an error before. */
long kdp_pin_huge_page(struct file *memfd, pgoff_t index, unsigned long *pfn)
{
	struct folio *folio;
	pgoff_t offset;
	long n = kdp_allocate_huge(memfd, index);

	/* A signal ends it: the fault goes on, at the risk of a lost reservation. */
	if (n < 0 && n != -EINTR)
		return n == -ENOSPC ? -ENOMEM : n;
	n = kdp_pin_folio(memfd, index, &folio, &offset);
	if (n < 0)
		return n;
	*pfn = folio_pfn(folio) + (offset >> PAGE_SHIFT);
	return folio_test_hwpoison(folio);
}

/*
 * Whether the page at @index of @memfd is @pfn, which is pinned, in a folio as
 * large as the block of 1 << @order pages around it. Folios are aligned to their
 * size both in the file and in memory.
 */
bool kdp_pfn_is_in_block(struct file *memfd, unsigned long pfn, pgoff_t index,
			 unsigned int order)
{
	struct folio *folio = pfn_folio(pfn);

	return folio_order(folio) >= order &&
	       (folio_test_hugetlb(folio) || !folio_test_has_hwpoisoned(folio)) &&
	       READ_ONCE(folio->mapping) == memfd->f_mapping &&
	       folio->index + (pfn - folio_pfn(folio)) == index;
}

/* Whether @memfd has a folio of that size at @index. Nothing keeps it. */
bool kdp_memfd_has_block(struct file *memfd, pgoff_t index, unsigned int order)
{
	struct folio *folio = filemap_get_folio(memfd->f_mapping, index);
	bool has;

	if (IS_ERR(folio))
		return false;
	has = folio_order(folio) >= order;
	folio_put(folio);
	return has;
}

/* Pins the folio of @pfn, which is pinned, once more. */
int kdp_pin_again(unsigned long pfn)
{
	return folio_add_pins(pfn_folio(pfn), 1);
}

void kdp_unpin_pfn(unsigned long pfn)
{
	struct folio *folio = pfn_folio(pfn);

	/* The guest has written through mappings that nobody watches. */
	folio_mark_dirty_lock(folio);
	unpin_folio(folio);
}

void kdp_zero_pfn(unsigned long pfn)
{
	clear_highpage(pfn_to_page(pfn));
}

unsigned long kdp_page_pfn(const struct page *page)
{
	return page_to_pfn(page);
}

void *kdp_page_words(struct page *page)
{
	return page_address(page);
}

/* memory errors */

/* Tells files apart as long as they are open: all opens of a memfd have it. */
unsigned long kdp_file_identity(struct file *file)
{
	return (unsigned long)file->f_mapping;
}

/* Which page of which file a frame is, if it is in a page cache. */
bool kdp_pfn_place(unsigned long pfn, unsigned long *file, unsigned long *index)
{
	struct page *page = pfn_to_online_page(pfn);
	struct folio *folio;
	bool found = false;

	if (!page)
		return false;
	folio = page_folio(page);
	if (!folio_try_get(folio))
		return false;
	/* Its mapping and index change under its lock. */
	folio_lock(folio);
	if (page_folio(page) == folio && folio->mapping &&
	    !folio_test_anon(folio)) {
		*file = (unsigned long)folio->mapping;
		*index = folio->index + (pfn - folio_pfn(folio));
		found = true;
	}
	folio_unlock(folio);
	folio_put(folio);
	return found;
}

/* Whether a page of a memfd can be read: the file knows which of a huge page can. */
bool kdp_memfd_can_read(struct file *memfd, pgoff_t index)
{
	loff_t at = (loff_t)index << PAGE_SHIFT;
	u8 byte;

	return kernel_read(memfd, &byte, sizeof(byte), &at) != -EIO;
}

/* bits that are locks */

/* Acquires: what was done under the lock before is seen. */
void kdp_bit_lock(unsigned long *word, int bit)
{
	wait_on_bit_lock(word, bit, TASK_UNINTERRUPTIBLE);
}

/* Acquires, too, if it is free. */
bool kdp_bit_trylock(unsigned long *word, int bit)
{
	return !test_and_set_bit_lock(bit, word);
}

/* Releases, to pair with those. */
void kdp_bit_unlock(unsigned long *word, int bit)
{
	clear_and_wake_up_bit(bit, word);
}

/* work */

struct workqueue_struct *kdp_alloc_workqueue(void)
{
	return alloc_workqueue("kvm_demand_paging", WQ_UNBOUND, 0);
}

void kdp_cond_resched(void)
{
	cond_resched();
}

/* counters */

/* @n counters of each CPU; 0 if there is no memory. */
unsigned long kdp_percpu_alloc(unsigned int n)
{
	/* The caller says ENOMEM: no warning. */
	return (unsigned long)__alloc_percpu_gfp(n * sizeof(u64), sizeof(u64),
						 GFP_KERNEL_ACCOUNT | __GFP_NOWARN);
}

void kdp_percpu_free(unsigned long counters)
{
	free_percpu((u64 __percpu *)counters);
}

void kdp_percpu_add(unsigned long counters, unsigned int i, u64 n)
{
	this_cpu_add(((u64 __percpu *)counters)[i], n);
}

u64 kdp_percpu_sum(unsigned long counters, unsigned int i)
{
	u64 sum = 0;
	int cpu;

	for_each_possible_cpu(cpu)
		sum += READ_ONCE(*per_cpu_ptr((u64 __percpu *)counters + i, cpu));
	return sum;
}

/* files */

struct file *kdp_memslot_file(const struct file_operations *fops)
{
	return anon_inode_create_getfile("[kvm-demand-paging-memslot]", fops,
					 NULL, O_RDWR, NULL);
}

struct file *kdp_claimant_file(const struct file_operations *fops)
{
	return anon_inode_getfile("[kvm-demand-paging-claimant]", fops, NULL,
				  O_RDWR);
}

struct inode *kdp_file_inode_get(struct file *file)
{
	struct inode *inode = file_inode(file);

	ihold(inode);
	return inode;
}

/* As drivers/dax/device.c does: all files of a memslot share one mapping. */
void kdp_file_redirect(struct file *file, struct inode *inode)
{
	file->f_mapping = inode->i_mapping;
	file->f_wb_err = filemap_sample_wb_err(file->f_mapping);
	file->f_mode |= FMODE_LSEEK;
}

/* What misc_open() left for the open of its device. */
struct miscdevice *kdp_file_misc(struct file *file)
{
	return file->private_data;
}

static int kdp_same_file(const void *p, struct file *file, unsigned int fd)
{
	return file == p;
}

/* Whether another descriptor of this process names the file. */
bool kdp_files_hold(struct file *file)
{
	return current->files && iterate_fd(current->files, 0, kdp_same_file,
					    file);
}

/* The identity that f_op->flush() is given when this process closes. */
void kdp_files_id(unsigned long *id)
{
	*id = (unsigned long)current->files;
}

/* threads */

struct task_struct *kdp_current(void)
{
	return current;
}

struct mm_struct *kdp_current_mm(void)
{
	return current->mm;
}

/* Whether the current thread runs task work before it sees user mode again. */
bool kdp_current_returns_to_user(void)
{
	return !(current->flags & (PF_KTHREAD | PF_USER_WORKER | PF_EXITING));
}

/*
 * Whether the current thread is ending or dumping core. A thread that is ending gets no more
 * signals (wants_signal() in kernel/signal.c), so nothing could end its wait. A core dump needs
 * present pages only.
 */
bool kdp_current_is_ending(void)
{
	return current->flags & (PF_EXITING | PF_DUMPCORE);
}

struct pid *kdp_current_pid(void)
{
	return task_pid(current);
}

struct pid *kdp_get_pid(struct pid *pid)
{
	return get_pid(pid);
}

bool kdp_pid_alive(struct pid *pid)
{
	bool alive;

	rcu_read_lock();
	alive = pid_task(pid, PIDTYPE_PID);
	rcu_read_unlock();
	return alive;
}

int kdp_current_pid_nr(void)
{
	return task_pid_nr(current);
}

bool kdp_fatal_signal_pending(void)
{
	return fatal_signal_pending(current);
}

/* waiting */

u64 kdp_now_ns(void)
{
	return local_clock();
}

bool kdp_completion_done(const struct completion *done)
{
	/* Pairs with the lock in complete_all(): what came before is seen. */
	return smp_load_acquire(&done->done);
}

/*
 * Whether to go on looking out, until @end at most. As kvm_vcpu_can_poll() in
 * virt/kvm/kvm_main.c has it: not where somebody else could run.
 */
bool kdp_may_look_out(u64 end)
{
	cpu_relax();
	return single_task_running() && !need_resched() &&
	       !signal_pending(current) && local_clock() < end;
}

/* Sleeps until @done or a signal; of those who sleep so, one is woken at a time. */
int kdp_wait_exclusive(struct wait_queue_head *queue, bool (*done)(void *data),
		       void *data)
{
	return wait_event_interruptible_exclusive(*queue, done(data));
}

bool kdp_has_sleeper(struct wait_queue_head *queue)
{
	return wq_has_sleeper(queue);
}

/* locks and trees */

void kdp_init_rwsem(struct rw_semaphore *sem, const char *name,
		    struct lock_class_key *key)
{
	__init_rwsem(sem, name, key);
}

/* For a lock that comes before others of its class, all of which @nest guards. */
void kdp_down_write_first(struct rw_semaphore *sem)
{
	down_write_nested(sem, SINGLE_DEPTH_NESTING);
}

void kdp_down_write_nest(struct rw_semaphore *sem, struct rw_semaphore *nest)
{
	down_write_nest_lock(sem, nest);
}

void kdp_xa_init(struct xarray *xa)
{
	xa_init_flags(xa, XA_FLAGS_ACCOUNT);
}

void *kdp_xa_cmpxchg(struct xarray *xa, unsigned long index, void *old,
		     void *entry)
{
	return xa_cmpxchg(xa, index, old, entry, GFP_KERNEL_ACCOUNT);
}

/* KVM's vCPU */

/*
 * By their pid, on which each holds a reference, so it names no other thread.
 * Changed under the lock, read under RCU.
 */
static DEFINE_HASHTABLE(vcpu_threads, 10);
static DEFINE_SPINLOCK(vcpu_threads_lock);

void kdp_vcpu_thread_add(struct kdp_vcpu_thread *thread)
{
	spin_lock(&vcpu_threads_lock);
	hash_add_rcu(vcpu_threads, &thread->node, (unsigned long)thread->pid);
	spin_unlock(&vcpu_threads_lock);
}

void kdp_vcpu_thread_del(struct kdp_vcpu_thread *thread)
{
	spin_lock(&vcpu_threads_lock);
	hash_del_rcu(&thread->node);
	spin_unlock(&vcpu_threads_lock);
}

/* That of the current thread, or NULL. The caller is in an RCU section. */
struct kdp_vcpu_thread *kdp_vcpu_thread_current(void)
{
	struct pid *pid = task_pid(current);
	struct kdp_vcpu_thread *thread;

	hash_for_each_possible_rcu(vcpu_threads, thread, node, (unsigned long)pid)
		if (thread->pid == pid)
			return thread;
	return NULL;
}

/*
 * Whether the current thread is in KVM_PRE_FAULT_MEMORY: that is the system call
 * it is in. Of 32-bit programs this is not known.
 */
bool kdp_current_pre_faults(void)
{
	struct pt_regs *regs = current_pt_regs();
	unsigned long args[6];

	/* They have the registers of whoever made them, or none. */
	if (current->flags & (PF_KTHREAD | PF_USER_WORKER) ||
	    syscall_get_nr(current, regs) != __NR_ioctl)
		return false;
	syscall_get_arguments(current, regs, args);
	return (u32)args[1] == KVM_PRE_FAULT_MEMORY;
}

u64 kdp_vcpu_guest_exits(const struct kvm_vcpu *vcpu)
{
	return vcpu->stat.exits;
}

bool kdp_vcpu_in_nested_guest(const struct kvm_vcpu *vcpu)
{
	return vcpu->arch.hflags & HF_GUEST_MASK;
}

bool kdp_vcpu_in_pfn_cache(const struct kvm_vcpu *vcpu)
{
	bool in = mutex_is_locked((struct mutex *)&vcpu->arch.pv_time.refresh_lock);

#ifdef CONFIG_KVM_XEN
	const struct kvm_vcpu_xen *xen = &vcpu->arch.xen;

	in |= mutex_is_locked((struct mutex *)&xen->vcpu_info_cache.refresh_lock) ||
	      mutex_is_locked((struct mutex *)&xen->vcpu_time_info_cache.refresh_lock) ||
	      mutex_is_locked((struct mutex *)&xen->runstate_cache.refresh_lock) ||
	      mutex_is_locked((struct mutex *)&xen->runstate2_cache.refresh_lock) ||
	      mutex_is_locked((struct mutex *)&vcpu->kvm->arch.xen.shinfo_cache.refresh_lock);
#endif
	return in;
}

/*
 * Has KVM wait for pages in the vCPU's own thread. With an asynchronous page fault, KVM would halt
 * the vCPU, and a kworker would wait: there would be no exit. That needs no consent of the guest
 * (kvm_can_do_async_pf() in arch/x86/kvm/x86.c).
 *
 * KVM limits how many a vCPU has outstanding. The count is used for nothing else
 * (virt/kvm/async_pf.c), and changed by the vCPU's thread alone.
 */
void kdp_vcpu_no_async_pf(struct kvm_vcpu *vcpu)
{
#ifdef CONFIG_KVM_ASYNC_PF
	if (vcpu->async_pf.queued < ASYNC_PF_PER_VCPU)
		vcpu->async_pf.queued += ASYNC_PF_PER_VCPU;
#endif
}

void kdp_vcpu_set_exit(struct kvm_vcpu *vcpu, u64 gpa, u64 size, u64 flags)
{
	struct kvm_run *run = vcpu->run;

	run->exit_reason = KVM_EXIT_MEMORY_FAULT;
	run->memory_fault.flags = flags;
	run->memory_fault.gpa = gpa;
	run->memory_fault.size = size;
}

/* Tracepoint @i of a module, or NULL if it has fewer. */
struct tracepoint *kdp_module_tracepoint(const struct tp_module *module,
					 unsigned int i)
{
	if (i >= module->mod->num_tracepoints)
		return NULL;
	return tracepoint_ptr_deref(&module->mod->tracepoints_ptrs[i]);
}

void kdp_tracepoint_synchronize(void)
{
	tracepoint_synchronize_unregister();
}

/* our own tracepoints */

void kdp_trace_fault(u32 slot, u64 page, u32 access, u32 order)
{
	trace_kdp_fault(slot, page, access, order);
}

void kdp_trace_exit(u32 slot, u64 page, u64 gpa, u64 flags)
{
	trace_kdp_exit(slot, page, gpa, flags);
}

void kdp_trace_wait(u32 slot, u64 page, u32 access)
{
	trace_kdp_wait(slot, page, access);
}

void kdp_trace_source(u32 slot, u64 first, u64 count, int error)
{
	trace_kdp_source(slot, first, count, error);
}

void kdp_trace_collapse(u32 slot, u64 first, u64 count)
{
	trace_kdp_collapse(slot, first, count);
}

void kdp_trace_resolve(u32 slot, u64 first, u64 count, u64 changed, u64 woken)
{
	trace_kdp_resolve(slot, first, count, changed, woken);
}
