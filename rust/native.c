// SPDX-License-Identifier: GPL-2.0
/* Pages of a shmem memfd, mapped as ordinary memory. See helpers.h. */
#include <linux/fs.h>
#include <linux/highmem.h>
#include <linux/huge_mm.h>
#include <linux/memcontrol.h>
#include <linux/oom.h>
#include <linux/pagemap.h>
#include <linux/sched/mm.h>
#include <linux/shmem_fs.h>

#include "helpers.h"

/* The memory cgroup of the current process, or NULL, with a reference. */
struct mem_cgroup *kdp_current_memcg_get(void)
{
	return get_mem_cgroup_from_mm(current->mm);
}

void kdp_memcg_put(struct mem_cgroup *memcg)
{
	mem_cgroup_put(memcg);
}

/*
 * A new file of the memfd's inode, with @fops, which can be written if @writable. Areas of this
 * file are in the memfd's own i_mmap tree, where the kernel's rmap finds them.
 *
 * The inode must be the memfd's: the kernel takes a file whose f_mapping is of shmem for a file of
 * a shmem inode (shmem_swap_usage() in mm/shmem.c, memfd_file_seals_ptr() in mm/memfd.c). For the
 * same reason no process may get a descriptor of this file: through /proc/PID/fd, it could open
 * the memfd.
 */
struct file *kdp_native_file(struct file *memfd, bool writable,
			     const struct file_operations *fops)
{
	struct inode *inode = file_inode(memfd);
	struct file *file;

	if (!fops_get(fops))
		return ERR_PTR(-ENODEV);
	ihold(inode);
	file = alloc_file_pseudo(inode, memfd->f_path.mnt, "kvm-demand-paging-memslot",
				 writable ? O_RDWR : O_RDONLY, fops);
	if (IS_ERR(file)) {
		iput(inode);
		fops_put(fops);
	}
	return file;
}

/* Makes a new area one of @file, which has the area's first page @base pages further on. */
void kdp_vma_redirect(struct vm_area_struct *vma, struct file *file, pgoff_t base)
{
	vma_set_file(vma, file);
	vma->vm_pgoff += base;
}

static struct page *good_page(struct folio *folio, pgoff_t index)
{
	struct page *page = folio_file_page(folio, index);
	int err;

	if (!folio_test_uptodate(folio))
		err = -ENOENT;
	else if (PageHWPoison(page))
		err = -EHWPOISON;
	else
		return page;
	folio_unlock(folio);
	folio_put(folio);
	return ERR_PTR(err);
}

/*
 * Page @index of the memfd, locked, with a reference, if the page cache has it. -ENOENT if it is a
 * hole, or nobody has written to it; -EBUSY if it was swapped out; -EAGAIN if the lock is taken
 * and @wait is false; -EHWPOISON if the page has a memory error.
 */
struct page *kdp_native_find(struct file *memfd, pgoff_t index, bool wait)
{
	struct folio *folio = __filemap_get_folio(memfd->f_mapping, index,
						  FGP_LOCK | (wait ? 0 : FGP_NOWAIT), 0);

	if (!IS_ERR(folio))
		return good_page(folio, index);
	if (folio == ERR_PTR(-ENOENT) && xa_is_value(xa_load(&memfd->f_mapping->i_pages, index)))
		return ERR_PTR(-EBUSY);
	return ERR_CAST(folio);
}

/*
 * The same, and brings the page into the page cache: allocates it, or reads it from swap. The
 * current process pays; if the thread has none, as a kworker, @memcg does.
 */
struct page *kdp_native_get(struct file *memfd, pgoff_t index, struct mem_cgroup *memcg)
{
	bool is_kthread = current->flags & PF_KTHREAD;
	struct mem_cgroup *old = is_kthread ? set_active_memcg(memcg) : NULL;
	struct folio *folio;
	int err = shmem_get_folio(file_inode(memfd), index, 0, &folio, SGP_CACHE);

	if (is_kthread)
		set_active_memcg(old);
	return err ? ERR_PTR(err) : good_page(folio, index);
}

/*
 * Waits for those who copy pages of the memfd to private ones: they have the pages' locks
 * (do_cow_fault() in mm/memory.c).
 */
void kdp_native_settle(struct file *memfd, pgoff_t first, pgoff_t count)
{
	struct folio_batch batch;
	pgoff_t at = first;

	folio_batch_init(&batch);
	while (filemap_get_folios(memfd->f_mapping, &at, first + count - 1, &batch)) {
		for (unsigned int i = 0; i < folio_batch_count(&batch); i++) {
			folio_lock(batch.folios[i]);
			folio_unlock(batch.folios[i]);
		}
		folio_batch_release(&batch);
		cond_resched();
	}
}

void kdp_native_put(struct page *page)
{
	struct folio *folio = page_folio(page);

	folio_unlock(folio);
	folio_put(folio);
}

/* The page's bytes were written. It is locked. */
void kdp_native_dirty(struct page *page)
{
	folio_mark_dirty(page_folio(page));
}

/*
 * Maps a locked page where the fault is.
 *
 * Never for writing: insert_page_into_pte_locked() in mm/memory.c would warn of an entry that
 * another thread has made meanwhile, if it is not this page's. The area's own protection makes
 * the entry writable all the same.
 *
 * Not where the OOM killer may have taken private copies, as in finish_fault().
 */
vm_fault_t kdp_native_insert(struct vm_fault *vmf, struct page *page)
{
	vm_fault_t unstable = 0;

	if (!(vmf->vma->vm_flags & VM_SHARED))
		unstable = check_stable_address_space(vmf->vma->vm_mm);
	if (unstable)
		return unstable;
	return vmf_insert_page_mkwrite(vmf, page, false);
}

/*
 * Maps those of pages @first to @last of the memfd that the page cache has and that belong to the
 * fault's page table. @page, the fault's own, is mapped and locked.
 *
 * filemap_map_pages() does not do: it maps all pages of a folio, also those that are absent.
 */
void kdp_native_insert_around(struct vm_fault *vmf, struct page *page, pgoff_t first,
			      pgoff_t last)
{
	const pgoff_t before = min(vmf->pgoff, pte_index(vmf->address));
	const pgoff_t after = PTRS_PER_PTE - 1 - pte_index(vmf->address);
	struct folio *own = page_folio(page);

	first = max(first, vmf->pgoff - before);
	last = min(last, vmf->pgoff + after);
	for (pgoff_t index = first; index <= last; index++) {
		bool is_own = folio_contains(own, index);
		struct page *near = is_own ? folio_file_page(own, index) :
					     kdp_native_find(vmf->vma->vm_file, index, false);
		struct vm_fault around = {
			.vma = vmf->vma,
			.address = vmf->address + ((index - vmf->pgoff) << PAGE_SHIFT),
		};

		if (IS_ERR(near))
			continue;
		if (index != vmf->pgoff && !PageHWPoison(near))
			vmf_insert_page_mkwrite(&around, near, false);
		if (!is_own)
			kdp_native_put(near);
	}
}

/* Hands a locked page and its reference to the kernel, which copies it to a private page. */
vm_fault_t kdp_native_copy_from(struct vm_fault *vmf, struct page *page)
{
	vmf->page = page;
	return VM_FAULT_LOCKED;
}

/* Maps the folio of a locked page as a block, if it is one. */
vm_fault_t kdp_native_insert_block(struct vm_fault *vmf, struct page *page)
{
	struct folio *folio = page_folio(page);

	if (folio_order(folio) != PMD_ORDER || folio_test_has_hwpoisoned(folio) ||
	    !pmd_none(pmdp_get_lockless(vmf->pmd)))
		return VM_FAULT_FALLBACK;
	return vmf_insert_folio_pmd(vmf, folio, false);
}
