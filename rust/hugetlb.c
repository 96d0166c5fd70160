// SPDX-License-Identifier: GPL-2.0
/* A huge page of a memfd that another one takes the place of. See helpers.h. */
#include <linux/fs.h>
#include <linux/falloc.h>
#include <linux/highmem.h>
#include <linux/hugetlb.h>
#include <linux/pagemap.h>

#include "helpers.h"

/* As migrate_huge_page_move_mapping() in mm/migrate.c. The folio is locked. */
static void kdp_put_in_place(struct address_space *mapping, pgoff_t index,
			     struct folio *folio)
{
	XA_STATE(xas, &mapping->i_pages, index);

	xas_lock_irq(&xas);
	folio->mapping = mapping;
	folio->index = index;
	xas_store(&xas, folio);
	xas_unlock_irq(&xas);
}

static bool kdp_is_at(const struct folio *folio, struct address_space *mapping,
		      pgoff_t index)
{
	return folio->mapping == mapping && folio->index == index;
}

/*
 * Exchanges the huge page of frame @bad, at @index of @memfd, for that of frame
 * @fresh, at @at of @other. The former is pinned @bad_pins times by who calls, the
 * latter @fresh_pins times. 0, and then @fresh is locked: who wants it as a page of its file
 * waits. -ENXIO if @bad has no memory error; -EBUSY if it is used, or pinned, by
 * somebody else, or if either is no longer where it is said to be.
 *
 * Each file has a huge page there before and after, so that what is counted and
 * reserved for it stays right. What keeps it sound:
 * - The inode locks keep away who takes pages out of the files: he has looked
 *   them up before, and would take out what is elsewhere by then.
 * - The folio locks keep away all others who use a page as one of a file: they
 *   look again once they have the lock (__filemap_get_folio_mpol()).
 * - No page table has either of them (and none comes to while they are locked),
 *   and memory_failure() has made sure that none gets @bad again.
 */
int kdp_exchange(struct file *memfd, pgoff_t index, unsigned long bad,
		 int bad_pins, struct file *other, pgoff_t at, unsigned long fresh,
		 int fresh_pins)
{
	struct address_space *here = memfd->f_mapping, *there = other->f_mapping;
	struct folio *from = pfn_folio(bad), *to = pfn_folio(fresh);
	int err = -EBUSY;

	lock_two_nondirectories(here->host, there->host);
	folio_lock(from);
	if (!folio_test_hwpoison(from)) {
		err = -ENXIO;
		goto out;
	}
	if (!folio_trylock(to))
		goto out;
	if (kdp_is_at(from, here, index) && !folio_mapped(from) &&
	    atomic_read(&from->_pincount) == bad_pins &&
	    kdp_is_at(to, there, at) && !folio_mapped(to) &&
	    atomic_read(&to->_pincount) == fresh_pins && !folio_test_hwpoison(to)) {
		kdp_put_in_place(here, index, to);
		kdp_put_in_place(there, at, from);
		err = 0;
	} else {
		folio_unlock(to);
	}
out:
	folio_unlock(from);
	unlock_two_nondirectories(here->host, there->host);
	return err;
}

void kdp_unlock_pfn(unsigned long pfn)
{
	folio_unlock(pfn_folio(pfn));
}

/* Copies a page whose frame may be bad; whether that could be read. */
bool kdp_copy_mc(unsigned long to, unsigned long from)
{
	return copy_mc_highpage(pfn_to_page(to), pfn_to_page(from)) == 0;
}

/* Takes the huge page at @index out of the memfd. */
void kdp_punch_huge(struct file *memfd, pgoff_t index)
{
	/* It cannot fail but for seals that the caller has kept away. */
	memfd->f_op->fallocate(memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			       (loff_t)index << PAGE_SHIFT,
			       huge_page_size(hstate_file(memfd)));
}
