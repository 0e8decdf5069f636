import { MergeView } from '@codemirror/merge'
import { EditorState } from '@codemirror/state'
import { basicSetup, EditorView } from 'codemirror'
import { useEffect, useRef } from 'react'

import { type Conflict, resolveConflict } from './store.ts'
import { look } from './theme.ts'

/** Both edits of a file: theirs on the left, on the right what will be saved. */
export default function ConflictDialog({ conflict }: { conflict: Conflict }) {
  const dialog = useRef<HTMLDialogElement>(null)
  const place = useRef<HTMLDivElement>(null)
  const view = useRef<MergeView | null>(null)

  useEffect(() => {
    dialog.current?.showModal()
    const made = new MergeView({
      a: { doc: conflict.theirs, extensions: [look, EditorState.readOnly.of(true)] },
      b: { doc: conflict.merged, extensions: [basicSetup, look, EditorView.contentAttributes.of({ 'aria-label': 'What will be saved' })] },
      parent: place.current!,
    })
    view.current = made
    return () => made.destroy()
  }, [conflict])

  return (
    <dialog ref={dialog} aria-labelledby="conflict-title" onCancel={(event) => event.preventDefault()}>
      <h2 id="conflict-title">{conflict.path}: somebody else changed the same lines</h2>
      <p>On the left is what they saved, on the right what will be saved: both edits stand there between marks. Nothing is lost; theirs stays in the history.</p>
      <div className="code" ref={place} />
      <div className="bar">
        <button onClick={() => resolveConflict(view.current!.b.state.doc.toString())}>Save the right side</button>
        <button onClick={() => resolveConflict(conflict.mine)}>Keep mine</button>
        <button onClick={() => resolveConflict(conflict.theirs)}>Take theirs</button>
      </div>
    </dialog>
  )
}
