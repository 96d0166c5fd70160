// SPDX-License-Identifier: GPL-2.0
/* Reading another file's pages: what the page cache offers to C alone. See helpers.h. */
#include <linux/blkdev.h>
#include <linux/fs.h>
#include <linux/highmem.h>
#include <linux/pagemap.h>
#include <linux/shmem_fs.h>

#include "helpers.h"

/* How the file is read, or -errno. */
int kdp_source_kind(struct file *file)
{
	struct address_space *mapping = file->f_mapping;
	umode_t mode = file_inode(file)->i_mode;

	if (!(file->f_mode & FMODE_READ))
		return -EACCES;
	if (!S_ISREG(mode) && !S_ISBLK(mode))
		return -EINVAL;
	if (IS_ANON_FILE(file_inode(file)) || !(file->f_mode & FMODE_PREAD))
		return -EINVAL;
	if (shmem_mapping(mapping))
		return KDP_SOURCE_SHMEM;
	if (mapping->a_ops->read_folio && !IS_DAX(mapping->host))
		return KDP_SOURCE_CACHE;
	/* What kernel_read() demands. */
	if (!file->f_op->read_iter || file->f_op->read)
		return -EINVAL;
	return KDP_SOURCE_READ;
}

/*
 * Copies page @index of the file to page frame @pfn, if the page cache has it:
 * 1; 0 if it has not. -ENODATA if the file ends before the page does.
 */
int kdp_source_copy(struct file *file, pgoff_t index, unsigned long pfn)
{
	struct address_space *mapping = file->f_mapping;
	loff_t end = ((loff_t)index + 1) << PAGE_SHIFT;
	struct folio *folio = filemap_get_folio(mapping, index);
	int result = 0;

	if (IS_ERR(folio))
		return 0;
	if (!folio_test_uptodate(folio))
		goto out;
	if (folio_contain_hwpoisoned_page(folio)) {
		result = -EIO;
		goto out;
	}
	copy_highpage(pfn_to_page(pfn), folio_file_page(folio, index));
	/*
	 * Truncation lowers the size, then zeroes or drops the page: what was
	 * copied is good if neither is seen now. Pairs with the order in
	 * truncate_setsize().
	 */
	smp_rmb();
	if (i_size_read(mapping->host) < end)
		result = -ENODATA;
	else if (READ_ONCE(folio->mapping) == mapping)
		result = 1;
out:
	folio_put(folio);
	return result;
}

static int kdp_shmem_fetch(struct file *file, pgoff_t index)
{
	struct folio *folio = NULL;
	int err;

	if ((loff_t)index >= i_size_read(file_inode(file)) >> PAGE_SHIFT)
		return -ENODATA;
	err = shmem_get_folio(file_inode(file), index, 0, &folio, SGP_READ);
	if (err)
		return err == -EINVAL ? -ENODATA : err;
	if (!folio)
		return KDP_FETCHED_HOLE;
	if (folio_contain_hwpoisoned_page(folio))
		err = -EIO;
	folio_unlock(folio);
	folio_put(folio);
	return err;
}

/*
 * Has the page cache read page @index of the file: 0, KDP_FETCHED_HOLE if there
 * is nothing to be read, or -errno. Sleeps; a fatal signal ends that.
 */
int kdp_source_fetch(struct file *file, int kind, pgoff_t index)
{
	struct address_space *mapping = file->f_mapping;
	struct folio *folio;
	int err = 0;

	if (kind == KDP_SOURCE_SHMEM)
		return kdp_shmem_fetch(file, index);
	if (((loff_t)index + 1) << PAGE_SHIFT > i_size_read(mapping->host))
		return -ENODATA;
	/* read_cache_folio() would wait for another reader whatever signal comes. */
	folio = filemap_get_folio(mapping, index);
	if (!IS_ERR(folio)) {
		if (!folio_test_uptodate(folio))
			err = folio_wait_locked_killable(folio);
		folio_put(folio);
		if (err)
			return err;
	}
	filemap_invalidate_lock_shared(mapping);
	folio = read_cache_folio(mapping, index, NULL, file);
	filemap_invalidate_unlock_shared(mapping);
	if (IS_ERR(folio))
		return PTR_ERR(folio);
	if (folio_contain_hwpoisoned_page(folio))
		err = -EIO;
	folio_put(folio);
	return err;
}

/* Begins to read @count pages from @index on, as far as the device likes. */
void kdp_source_ahead(struct file *file, pgoff_t index, unsigned long count)
{
	struct file_ra_state ra = {};

	file_ra_state_init(&ra, file->f_mapping);
	page_cache_sync_readahead(file->f_mapping, &ra, file, index, count);
}

/* Reads page @index of a file that has no page cache into @page. */
int kdp_source_read(struct file *file, pgoff_t index, struct page *page)
{
	loff_t at = (loff_t)index << PAGE_SHIFT;
	size_t done = 0;

	while (done < PAGE_SIZE) {
		ssize_t n = kernel_read(file, page_address(page) + done,
					PAGE_SIZE - done, &at);

		if (n < 0)
			return n;
		if (n == 0)
			return -ENODATA;
		done += n;
	}
	return 0;
}

void kdp_copy_to_pfn(unsigned long pfn, struct page *page)
{
	copy_highpage(pfn_to_page(pfn), page);
}
