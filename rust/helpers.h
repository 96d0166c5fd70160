/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the kernel gives only as static inlines, macros or struct layouts that
 * its Rust bindings lack. Each function is one such thing; no policy is here.
 */
#ifndef KDP_HELPERS_H
#define KDP_HELPERS_H

#include <linux/completion.h>
#include <linux/fcntl.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/miscdevice.h>
#include <linux/rwsem.h>
#include <linux/sched/user.h>
#include <linux/tracepoint.h>
#include <linux/wait.h>
#include <linux/xarray.h>

struct kvm_vcpu;

/* Probes of the kernel's tracepoints. probes.c checks that the kernel has these prototypes. */
typedef void (*kdp_kvm_page_fault_probe)(void *data, struct kvm_vcpu *vcpu,
					 u64 address, u64 error_code);
typedef void (*kdp_kvm_userspace_exit_probe)(void *data, u32 reason, int err);
typedef void (*kdp_memory_failure_event_probe)(void *data, unsigned long pfn,
					       int type, int result);

/* memory mapping */

/* In Linux 7.2, the kernel's Rust binding of VM_MAYSHARE has the value of VM_MAYEXEC. */
static const vm_flags_t KDP_VM_MAYSHARE = VM_MAYSHARE;

bool kdp_fault_is_in_block(const struct vm_fault *vmf);
bool kdp_fault_is_mapped(const struct vm_fault *vmf, unsigned long address);
void kdp_insert_pfns(struct vm_area_struct *vma, unsigned long address,
		     const unsigned long *pfns, u64 there);
bool kdp_fault_is_empty(const struct vm_fault *vmf);
void kdp_release_fault_lock(struct vm_fault *vmf);
bool kdp_fault_is_in_kthread(const struct vm_fault *vmf);
bool kdp_fault_is_in_kworker(const struct vm_fault *vmf);
bool kdp_vma_is_shared(const struct vm_area_struct *vma);
pgoff_t kdp_vma_pgoff(const struct vm_area_struct *vma);
void kdp_vma_change_flags(struct vm_area_struct *vma, vm_flags_t add, vm_flags_t clear);
bool kdp_vma_may_be_huge(struct vm_area_struct *vma);
bool kdp_has_page_table(struct mm_struct *mm, unsigned long address);
void kdp_mmap_read_lock(struct mm_struct *mm);
void kdp_mmap_read_unlock(struct mm_struct *mm);
int kdp_map_count(const struct mm_struct *mm);
bool kdp_mm_is_used(struct mm_struct *mm);
bool kdp_current_may_use_mm(void);
unsigned long kdp_map_anew(struct file *file, unsigned long address,
			   unsigned long bytes, vm_flags_t flags,
			   unsigned long pgoff);
void kdp_vma_setup(struct vm_area_struct *vma, vm_flags_t flags,
		   const struct vm_operations_struct *ops, void *owner);

/* memory backing */
unsigned int kdp_memfd_seals(struct file *file, bool *is_memfd);
unsigned int kdp_memfd_order(struct file *file);
loff_t kdp_file_size(struct file *file);
bool kdp_file_writable(struct file *file);
int kdp_mapping_hold_writable(struct file *file);
void kdp_mapping_release_writable(struct file *file);
long kdp_pin_huge_page(struct file *memfd, pgoff_t index, unsigned long *pfn);
bool kdp_pfn_is_in_block(struct file *memfd, unsigned long pfn, pgoff_t index,
			 unsigned int order);
bool kdp_memfd_has_block(struct file *memfd, pgoff_t index, unsigned int order);
int kdp_pin_again(unsigned long pfn);
void kdp_unpin_pfn(unsigned long pfn);
void kdp_zero_pfn(unsigned long pfn);
unsigned long kdp_page_pfn(const struct page *page);
unsigned long kdp_file_identity(struct file *file);
bool kdp_memfd_can_read(struct file *memfd, pgoff_t index);
bool kdp_pfn_place(unsigned long pfn, unsigned long *file, unsigned long *index);
void *kdp_page_words(struct page *page);

/* files that pages are read from: page_cache.c */
enum kdp_source_kind {
	KDP_SOURCE_CACHE,	/* through the page cache */
	KDP_SOURCE_SHMEM,	/* tmpfs: so, too, but by its own calls */
	KDP_SOURCE_READ,	/* by reading it, as any program does */
};
enum kdp_fetched {
	KDP_FETCHED_HOLE = 1,
};
int kdp_source_kind(struct file *file);
int kdp_source_copy(struct file *file, pgoff_t index, unsigned long pfn);
int kdp_source_fetch(struct file *file, int kind, pgoff_t index);
void kdp_source_ahead(struct file *file, pgoff_t index, unsigned long count);
int kdp_source_read(struct file *file, pgoff_t index, struct page *page);
void kdp_copy_to_pfn(unsigned long pfn, struct page *page);

/* pages of a memfd that are mapped as ordinary memory: native.c */
struct mem_cgroup;
struct mem_cgroup *kdp_current_memcg_get(void);
void kdp_memcg_put(struct mem_cgroup *memcg);
struct file *kdp_native_file(struct file *memfd, bool writable,
			     const struct file_operations *fops);
void kdp_native_settle(struct file *memfd, pgoff_t first, pgoff_t count);
void kdp_vma_redirect(struct vm_area_struct *vma, struct file *file, pgoff_t base);
struct page *kdp_native_find(struct file *memfd, pgoff_t index, bool wait);
struct page *kdp_native_get(struct file *memfd, pgoff_t index, struct mem_cgroup *memcg);
void kdp_native_put(struct page *page);
void kdp_native_dirty(struct page *page);
vm_fault_t kdp_native_insert(struct vm_fault *vmf, struct page *page);
void kdp_native_insert_around(struct vm_fault *vmf, struct page *page, pgoff_t first,
			      pgoff_t last);
vm_fault_t kdp_native_copy_from(struct vm_fault *vmf, struct page *page);
vm_fault_t kdp_native_insert_block(struct vm_fault *vmf, struct page *page);

/* shmem files with folios of 2 MiB, and memory policies of shmem: shmem.c */
struct mempolicy;
int kdp_shmem_init(void);
void kdp_shmem_exit(void);
bool kdp_shmem_has_huge(void);
struct file *kdp_shmem_huge_file(loff_t size);
int kdp_shmem_set_policy(struct vm_area_struct *vma, struct mempolicy *policy);
struct mempolicy *kdp_shmem_get_policy(struct vm_area_struct *vma, unsigned long addr,
				       pgoff_t *interleave);

/* huge pages that are replaced: hugetlb.c */
int kdp_take_out(struct file *memfd, pgoff_t index, unsigned long pfn);
int kdp_check_bad(struct file *memfd, pgoff_t index, unsigned long pfn, int pins);
void kdp_put_in_place(struct file *memfd, pgoff_t index, unsigned long bad,
		      unsigned long fresh);
bool kdp_copy_mc(unsigned long to, unsigned long from);

/* bits that are locks */
void kdp_bit_lock(unsigned long *word, int bit);
bool kdp_bit_trylock(unsigned long *word, int bit);
void kdp_bit_unlock(unsigned long *word, int bit);

/* work */
struct workqueue_struct *kdp_alloc_workqueue(void);
void kdp_cond_resched(void);

/* counters */
unsigned long kdp_percpu_alloc(unsigned int n);
void kdp_percpu_free(unsigned long counters);
void kdp_percpu_add(unsigned long counters, unsigned int i, u64 n);
u64 kdp_percpu_sum(unsigned long counters, unsigned int i);

/* files */
struct file *kdp_memslot_file(const struct file_operations *fops);
struct file *kdp_claimant_file(const struct file_operations *fops);
struct inode *kdp_file_inode_get(struct file *file);
void kdp_file_redirect(struct file *file, struct inode *inode);
struct miscdevice *kdp_file_misc(struct file *file);
bool kdp_files_hold(struct file *file);
void kdp_files_id(unsigned long *id);

/* threads */
struct task_struct *kdp_current(void);
struct mm_struct *kdp_current_mm(void);
bool kdp_current_returns_to_user(void);
bool kdp_current_is_ending(void);
struct pid *kdp_current_pid(void);
struct pid *kdp_get_pid(struct pid *pid);
bool kdp_pid_alive(struct pid *pid);
int kdp_current_pid_nr(void);
bool kdp_fatal_signal_pending(void);

/* waiting */
u64 kdp_now_ns(void);
bool kdp_completion_done(const struct completion *done);
bool kdp_may_look_out(u64 end);
int kdp_wait_exclusive(struct wait_queue_head *queue, bool (*done)(void *data),
		       void *data);
bool kdp_has_sleeper(struct wait_queue_head *queue);

/* locks and trees */
void kdp_init_rwsem(struct rw_semaphore *sem, const char *name,
		    struct lock_class_key *key);
void kdp_down_write_first(struct rw_semaphore *sem);
void kdp_down_write_nest(struct rw_semaphore *sem, struct rw_semaphore *nest);
void kdp_xa_init(struct xarray *xa);
void *kdp_xa_cmpxchg(struct xarray *xa, unsigned long index, void *old,
		     void *entry);

/* KVM's vCPU */
u64 kdp_vcpu_guest_exits(const struct kvm_vcpu *vcpu);
bool kdp_vcpu_in_nested_guest(const struct kvm_vcpu *vcpu);
bool kdp_vcpu_in_pfn_cache(const struct kvm_vcpu *vcpu);
void kdp_vcpu_no_async_pf(struct kvm_vcpu *vcpu);
void kdp_vcpu_set_exit(struct kvm_vcpu *vcpu, u64 gpa, u64 size, u64 flags);

/* A thread that asked for exits, first in what the module knows of it. */
struct kdp_vcpu_thread {
	struct hlist_node node;
	struct pid *pid;
};
void kdp_vcpu_thread_add(struct kdp_vcpu_thread *thread);
void kdp_vcpu_thread_del(struct kdp_vcpu_thread *thread);
struct kdp_vcpu_thread *kdp_vcpu_thread_current(void);
bool kdp_current_pre_faults(void);

struct tracepoint *kdp_module_tracepoint(const struct tp_module *module,
					 unsigned int i);
void kdp_tracepoint_synchronize(void);

/* our own tracepoints */
DECLARE_TRACEPOINT(kdp_fault);
DECLARE_TRACEPOINT(kdp_exit);
void kdp_trace_fault(u32 slot, u64 page, u32 access, u32 order);
void kdp_trace_exit(u32 slot, u64 page, u64 gpa, u64 flags);
void kdp_trace_wait(u32 slot, u64 page, u32 access);
void kdp_trace_source(u32 slot, u64 first, u64 count, int error);
void kdp_trace_collapse(u32 slot, u64 first, u64 count);
void kdp_trace_resolve(u32 slot, u64 first, u64 count, u64 changed, u64 woken);

#endif
