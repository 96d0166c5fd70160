// SPDX-License-Identifier: GPL-2.0
/* A huge page of a memfd that another one takes the place of. See helpers.h. */
#include <linux/fs.h>
#include <linux/falloc.h>
#include <linux/highmem.h>
#include <linux/hugetlb.h>
#include <linux/pagemap.h>

#include "helpers.h"

static bool kdp_is_at(const struct folio *folio, struct file *memfd,
		      pgoff_t index)
{
	return folio->mapping == memfd->f_mapping && folio->index == index;
}

static bool kdp_is_ours(const struct folio *folio, int pins)
{
	return !folio_mapped(folio) && atomic_read(&folio->_pincount) == pins;
}

/*
 * Takes the huge page of frame @pfn, which is pinned once, out of @memfd, where
 * it is at @index: nobody else can come to it any more. -EBUSY if somebody uses
 * it, or it has a memory error.
 */
int kdp_take_out(struct file *memfd, pgoff_t index, unsigned long pfn)
{
	struct folio *folio = pfn_folio(pfn);
	long err;

	if (!kdp_is_at(folio, memfd, index) || !kdp_is_ours(folio, 1) ||
	    folio_test_hwpoison(folio))
		return -EBUSY;
	err = memfd->f_op->fallocate(memfd,
				     FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				     (loff_t)index << PAGE_SHIFT,
				     folio_size(folio));
	if (err)
		return err;
	/* Somebody may have been faster; to what was his he can come no more. */
	return folio->mapping || !kdp_is_ours(folio, 1) ? -EBUSY : 0;
}

/*
 * Whether the huge page of frame @pfn, at @index of @memfd, is one to replace: -ENXIO
 * if it has no memory error, -EBUSY if it is used by others than those who pin it
 * @pins times.
 */
int kdp_check_bad(struct file *memfd, pgoff_t index, unsigned long pfn, int pins)
{
	struct folio *folio = pfn_folio(pfn);

	if (!folio_test_hwpoison(folio))
		return -ENXIO;
	return kdp_is_at(folio, memfd, index) && kdp_is_ours(folio, pins) ? 0 : -EBUSY;
}

/*
 * Puts the huge page of frame @fresh, which is in no file, where that of frame
 * @bad is in @memfd, at @index, unless that has been taken out meanwhile. Both are
 * pinned. As migrate_huge_page_move_mapping() in mm/migrate.c; the file has a
 * huge page there before and after, so that what is counted and reserved for it
 * stays right. What keeps it sound:
 * - The inode lock keeps away who takes pages out of the file: he looks them up
 *   first, and would take out what is no longer there.
 * - The folio lock keeps away all others who use the page as one of the file:
 *   they look again once they have it (__filemap_get_folio_mpol()).
 * - No page table has @bad since memory_failure(), nor gets it.
 */
void kdp_put_in_place(struct file *memfd, pgoff_t index, unsigned long bad,
		      unsigned long fresh)
{
	struct address_space *mapping = memfd->f_mapping;
	struct folio *from = pfn_folio(bad), *to = pfn_folio(fresh);
	long pages = folio_nr_pages(to);
	XA_STATE(xas, &mapping->i_pages, index);
	bool is_there;

	inode_lock(mapping->host);
	folio_lock(from);
	folio_lock(to);
	is_there = kdp_is_at(from, memfd, index);
	if (is_there) {
		/* As hugetlb_add_to_page_cache(); taking it out has cleared both. */
		folio_mark_uptodate(to);
		folio_set_dirty(to);
		xas_lock_irq(&xas);
		to->mapping = mapping;
		to->index = index;
		folio_ref_add(to, pages);
		xas_store(&xas, to);
		from->mapping = NULL;
		xas_unlock_irq(&xas);
	}
	folio_unlock(to);
	folio_unlock(from);
	inode_unlock(mapping->host);
	if (is_there)
		folio_put_refs(from, pages);
}

/* Copies a page whose frame may be bad; whether that could be read. */
bool kdp_copy_mc(unsigned long to, unsigned long from)
{
	return copy_mc_highpage(pfn_to_page(to), pfn_to_page(from)) == 0;
}
