import { MergeView } from '@codemirror/merge'
import { EditorState } from '@codemirror/state'
import { EditorView } from 'codemirror'
import { useEffect, useRef, useState } from 'react'

import type { Version } from './project.ts'
import { restore } from './store.ts'
import { look } from './theme.ts'

const read = [look, EditorState.readOnly.of(true), EditorView.lineWrapping]

/** The versions of one file, each beside the newest. */
export default function History({ path, versions }: { path: string; versions: Version[] }) {
  const [chosen, setChosen] = useState(1)
  const place = useRef<HTMLDivElement>(null)
  const [newest] = versions
  const old = versions[Math.min(chosen, versions.length - 1)]

  useEffect(() => {
    const view = new MergeView({
      a: { doc: old?.content ?? '', extensions: read },
      b: { doc: newest?.content ?? '', extensions: read },
      collapseUnchanged: { margin: 3 },
      parent: place.current!,
    })
    return () => view.destroy()
  }, [old, newest])

  if (!newest || !old) return <p className="alone">{path} has no history.</p>
  return (
    <div className="history">
      <div className="bar">
        <label>
          Compare version{' '}
          <select value={chosen} onChange={(event) => setChosen(Number(event.target.value))}>
            {versions.map((each, index) => (
              <option key={each.version} value={index}>
                {each.version}: {new Date(each.created_at).toLocaleString()}{each.is_deleted ? ', deleted' : ''}
              </option>
            ))}
          </select>{' '}
          with {newest.version}, the newest
        </label>
        <button disabled={old.is_deleted || old === newest} onClick={() => restore(path, old.version)}>Restore it</button>
      </div>
      <div className="code" ref={place} />
    </div>
  )
}
